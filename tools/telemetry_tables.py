"""Fills the tables of docs/telemetry.md from `hiprune.telemetry.names`.

`python tools/telemetry_tables.py`. A table NAME stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test
holds them fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from hiprune.telemetry import names

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "telemetry.md"

_NAMED: Final = "a name in the tenants file, or `anonymous`"
_ROOTS: Final = ("AskImage (call)", "GenerateText", "PruneTokens")


def refreshed(text: str) -> str:
    """The page with its tables made anew. Raises ValueError when a pair of markers is not there once."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"expected {start} and {end} once each")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


def tree() -> str:
    """The edges as a drawing: a trace of each method that has more than one span."""
    lines: list[str] = []
    for root in _ROOTS:
        lines.append(root)
        _grow(root, "", lines)
    return "```\n" + "\n".join(lines) + "\n```"


def _grow(parent: str, indent: str, lines: list[str]) -> None:
    children = [child for start, child in names.EDGES if start == parent]
    for place, child in enumerate(children, start=1):
        last = place == len(children)
        lines.append(f"{indent}{'└─ ' if last else '├─ '}{child}")
        _grow(child, indent + ("   " if last else "│  "), lines)


def spans() -> str:
    """Every span within a service."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in names.SPANS.items()]
    return "\n".join(("| span | spans |", "|---|---|", *rows))


def metrics() -> str:
    """Every metric, its name in Prometheus, unit, labels and meaning."""
    lines = ["| metric | in Prometheus | kind, unit | labels | |", "|---|---|---|---|---|"]
    for kind, instruments in names.METRICS.items():
        for name, each in instruments.items():
            called = names.prometheus_name(name, kind, each.unit) + ("_total" if kind == "counter" else "")
            cells = (f"`{name}`", f"`{called}`", f"{kind}, `{each.unit}`", _labels(each.labels), each.meaning)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _labels(labels: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"`{name}`" for name in labels)


def values() -> str:
    """Every label and the values that it may have."""
    found: dict[str, list[str]] = {}
    for instruments in names.METRICS.values():
        for each in instruments.values():
            for label, allowed in each.labels.items():
                held = found.setdefault(label, [])
                held += [value for value in allowed if value not in held]
    rows = [
        f"| `{label}` | {', '.join(f'`{each}`' for each in allowed) or _NAMED} |"
        for label, allowed in found.items()
    ]
    return "\n".join(("| label | values |", "|---|---|", *rows))


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "tree": tree,
    "spans": spans,
    "metrics": metrics,
    "values": values,
}


def main() -> None:
    """Rewrites the page."""
    PAGE.write_text(refreshed(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
