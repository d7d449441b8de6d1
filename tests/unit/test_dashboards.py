"""Claim: the dashboard and the alerts ask for series and labels that the services export, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hiprune.telemetry import names

ROOT = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((ROOT / "grafana" / "dashboards" / "hiprune.json").read_text("utf-8"))
RULES = yaml.safe_load((ROOT / "prometheus" / "alerts.yaml").read_text("utf-8"))
SCRAPED = yaml.safe_load((ROOT / "prometheus" / "prometheus.yaml").read_text("utf-8"))

OURS = names.prometheus_series()
TARGET = frozenset({"job", "instance"})
"""What Prometheus adds to every series."""
OTHERS = {
    "up": frozenset[str](),
    # prometheus_client's own, of every process
    "process_resident_memory_bytes": frozenset[str](),
    "process_cpu_seconds_total": frozenset[str](),
}
WORDS = {
    "by",
    "without",
    "on",
    "ignoring",
    "and",
    "or",
    "unless",
    "offset",
    "bool",
    "group_left",
    "group_right",
}

NAME = r"(?<![\w.:])[a-zA-Z_:][\w:]*+"
SELECTOR = re.compile(rf"({NAME})\s*(?:\{{([^}}]*)\}})?(?!\s*\()")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


def selectors(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each series of a PromQL expression with the values that its labels are held against."""
    for words in (r"\[[^\]]*\]", r"\boffset\s+\w+", GROUPING):
        query = re.sub(words, " ", query)
    for name, matchers in SELECTOR.findall(query):
        if name not in WORDS:
            yield name, dict(re.findall(rf'({NAME})\s*=~?\s*"([^"]*)"', matchers))


def groupings(query: str) -> set[str]:
    """Labels that an expression groups by."""
    return {label.strip() for found in GROUPING.findall(query) for label in found.split(",") if label.strip()}


def test_selectors_are_read_as_prometheus_reads_them():
    query = (
        'histogram_quantile(0.95, sum by (le, rpc) (rate(a_bucket{rpc="x", code=~"OK|NO"}[5m] offset 1h)))'
        " / on (job) vector(1) and c:d:rate5m > 0.5e3 or up == 0"
    )
    assert list(selectors(query)) == [
        ("a_bucket", {"rpc": "x", "code": "OK|NO"}),
        ("c:d:rate5m", {}),
        ("up", {}),
    ]
    assert groupings(query) == {"le", "rpc", "job"}


def panels() -> list[tuple[str, str]]:
    """Every query of the dashboard, and the panel that it is in."""
    return [
        (panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


def rules() -> list[tuple[str, str]]:
    """Every expression of the rules, by the rule's name."""
    return [
        (rule.get("alert") or rule["record"], rule["expr"])
        for group in RULES["groups"]
        for rule in group["rules"]
    ]


RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}


@pytest.mark.parametrize(("where", "query"), [*panels(), *rules()])
def test_a_query_names_series_labels_and_values_that_exist(where, query):
    known: set[str] = set(TARGET)
    found = list(selectors(query))
    assert found
    for name, matchers in found:
        if name in RECORDED:
            continue
        labels = OURS[name] if name in OURS else OTHERS[name]
        known |= labels
        for label, pattern in matchers.items():
            assert label in labels | TARGET, f"{where}: {name} has no label {label}"
            for value in pattern.split("|"):
                assert value in values_of(label), f"{where}: {label} is never {value}"
    assert groupings(query) <= known, where


def values_of(label: str) -> set[str]:
    """The values that a label may have, of any metric."""
    if label == "job":
        return {"hiprune-.*", *jobs()}
    declared = {
        value
        for instruments in names.METRICS.values()
        for instrument in instruments.values()
        for value in instrument.labels.get(label, ())
    }
    assert declared, f"{label} has no listed values"
    return declared


def jobs() -> set[str]:
    return {each["job_name"] for each in SCRAPED["scrape_configs"]}


def test_every_service_is_scraped_under_the_name_it_gives_itself():
    assert {"hiprune-encoder", "hiprune-pruner", "hiprune-llm"} <= jobs()


def test_every_metric_is_on_the_dashboard():
    shown = {name for _, query in (*panels(), *rules()) for name, _ in selectors(query)}
    for kind, instruments in names.METRICS.items():
        for name, instrument in instruments.items():
            base = names.prometheus_name(name, kind, instrument.unit)
            series = {f"{base}{suffix}" for suffix in ("", "_total", "_sum", "_count", "_bucket")}
            assert series & shown, f"{name} is shown nowhere"


def test_every_alert_says_what_it_means_and_who_is_to_act():
    alerts = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
    assert {"HipruneBudgetBurnsFast", "HipruneCacheDown", "HipruneQueueFull", "HipruneRetentionDrifts"} <= {
        rule["alert"] for rule in alerts
    }
    tested = (ROOT / "prometheus" / "alerts_test.yaml").read_text("utf-8")
    for rule in alerts:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]
        assert f"alertname: {rule['alert']}\n" in tested, f"{rule['alert']} is tested nowhere"


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
