"""Claims about the names that are declared: that there are no others, and what Prometheus makes of them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from hiprune import errors, telemetry
from hiprune.telemetry import names
from hiprune.v1 import pruner_service_pb2
from tools import telemetry_tables

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path.read_text("utf-8")
    for folder in ("src/hiprune", "services")
    for path in (ROOT / folder).rglob("*.py")
    # errors in HTTP are the gateway's own, and what a command says by itself is counted nowhere
    if not {"v1", "gateway", "commands", "cli.py"} & {*path.parts}
]


def test_every_rpc_of_the_protos_is_declared():
    found = {}
    for module in ("encoder_service", "pruner_service", "llm_service"):
        descriptor = importlib.import_module(f"hiprune.v1.{module}_pb2").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            found |= {method.name: service.full_name for method in service.methods}
    assert found == names.RPCS


def test_edges_join_what_is_declared_and_leave_out_nothing():
    ends = {name for edge in names.EDGES for name in edge}
    calls = {f"{rpc} (call)" for rpc in names.RPCS}
    assert ends <= {*names.SPANS, *names.RPCS, *calls}
    assert {*names.SPANS} <= {child for _, child in names.EDGES}
    assert len(set(names.EDGES)) == len(names.EDGES)
    assert {*names.STAGES} == {*names.SPANS} - {"capture"}


def test_every_reason_of_an_error_is_a_value_of_the_label():
    found = {kind.default_reason for kind in vars(errors).values() if hasattr(kind, "default_reason")}
    for source in SOURCES:
        found |= set(re.findall(r'reason="([A-Z_]+)"', source))
    found |= {f"{peer}_{end}" for peer in ("ENCODER", "PRUNER") for end in ("UNREACHABLE", "STOPPED")}
    assert len(found) > 15
    assert found == {*names.REASONS} - {"CLIENT_LEFT", "OTHER"}


def test_every_method_is_a_value_of_the_label():
    found = {name.removeprefix("METHOD_").lower() for name, _ in pruner_service_pb2.Method.items()}
    assert found - {"unspecified"} == {*names.METHODS}


def test_every_name_that_is_recorded_is_a_literal_that_is_declared():
    recorded = {
        (kind, name)
        for source in SOURCES
        for kind, name in re.findall(r'\b(count|observe|watch|measure)\(\s*"([\w.]+)"', source)
    }
    kinds = {"count": "counter", "observe": "histogram", "watch": "gauge", "measure": "gauge"}
    assert len(recorded) > 20
    assert all(name in names.METRICS[kinds[kind]] for kind, name in recorded)
    # and what is declared is recorded: by its name, or through `record`, which knows its histogram
    declared = {name for each in names.METRICS.values() for name in each}
    assert declared == {name for _, name in recorded}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (lambda: telemetry.count("hiprune.other"), "counter 'hiprune.other' is not declared"),
        (lambda: telemetry.observe("hiprune.requests", 1.0), "histogram 'hiprune.requests' is not declared"),
        (lambda: telemetry.measure("hiprune.other", 1), "gauge 'hiprune.other' is not declared"),
        (lambda: telemetry.count("hiprune.cache.stored"), r"labels \[\], expected \['level'\]"),
        (lambda: telemetry.count("hiprune.cache.stored", level="raw"), "level is 'raw', expected one of enc"),
        (lambda: telemetry.watch("hiprune.queue.depth", float, queue="bus"), "queue is 'bus', expected"),
    ],
)
def test_what_is_not_declared_is_refused(record, complaint):
    with pytest.raises(ValueError, match=complaint):
        record()


def test_every_histogram_has_buckets_that_ascend_and_nothing_else_has_any():
    for kind, instruments in names.METRICS.items():
        for instrument in instruments.values():
            assert bool(instrument.buckets) == (kind == "histogram")
            assert list(instrument.buckets) == sorted(set(instrument.buckets))
            assert instrument.meaning
            assert instrument.meaning[-1] != "."


def test_names_in_prometheus_follow_opentelemetrys_rules():
    # as OpenTelemetry's own exporter for Prometheus writes them
    assert {
        "hiprune_requests_total",
        "hiprune_cache_stored_bytes_total",
        "hiprune_rpc_duration_seconds_bucket",
        "hiprune_retention_bucket",
        "hiprune_engine_blocks_held_ratio",
        "hiprune_intake_held_bytes",
        "hiprune_queue_depth",
    } <= names.prometheus_series().keys()
    assert names.prometheus_series()["hiprune_stage_duration_seconds_bucket"] == {"stage", "le"}


def test_the_page_on_telemetry_has_the_tables_that_the_names_make():
    page = ROOT / "docs" / "telemetry.md"
    text = page.read_text("utf-8")
    assert telemetry_tables.refreshed(text) == text, "run `python tools/telemetry_tables.py`"
