"""Draws the dashboard's panels from what a Prometheus knows, as a picture for the documentation.

`python tools/draw_dashboard.py http://127.0.0.1:9090 docs/images/dashboard.png`. Each panel of
deploy/grafana/dashboards/hiprune.json is asked for as Grafana would ask, and drawn in its place. Ends with an
error when a query is refused, or when a panel has nothing to show that should.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "dashboards" / "hiprune.json"
STEP_S: Final = 2
RATE: Final = "30s"
"""What stands in for Grafana's `$__rate_interval`; at least four times what Prometheus scrapes."""
QUIET: Final = frozenset({"Refused by a limit"})
"""Panels that are empty while all is well."""
COLOURS: Final = (
    "#56a64b",
    "#3274d9",
    "#e0b400",
    "#e02f44",
    "#a352cc",
    "#ff780a",
    "#0f8a8a",
    "#8c8c8c",
    "#c15c17",
)
GROUND, PANEL, INK, FAINT = "#f4f5f5", "#ffffff", "#24292e", "#d8d9da"
_UNITS: Final = {"reqps": " req/s", "ops": " /s", "s": " s", "flops": "FLOP/s", "bytes": "B", "Bps": "B/s"}


def ask(
    prometheus: str, query: str, start: float, end: float
) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
    """A query's series: labels, and points in seconds from `end`. Raises HTTPError when it is refused."""
    fields = {"query": query.replace("$__rate_interval", RATE), "start": start, "end": end, "step": STEP_S}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(fields)}"
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - the address is the caller's
        found = json.load(answer)["data"]["result"]
    return [
        (
            series["metric"],
            [(at - end, float(value)) for at, value in series["values"] if math.isfinite(float(value))],
        )
        for series in found
    ]


def shown(value: float, unit: str) -> str:
    """A value as a person reads it."""
    if unit == "percentunit":
        return f"{100 * value:.4g} %"
    if unit == "s" and 0 < value < 1:
        return f"{1000 * value:.3g} ms"
    if unit in {"bytes", "Bps", "flops", "short"}:
        for power, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= power:
                return f"{value / power:.3g} {sign}{_UNITS.get(unit, '')}"
    return f"{value:.3g}{_UNITS.get(unit, '')}"


def legend(template: str, labels: dict[str, str]) -> str:
    """Grafana's `{{label}}` filled in."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template).strip()


def draw(prometheus: str, out: Path, minutes: float, end: float) -> list[str]:
    """Draws; returns the titles of the panels that were empty."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    from matplotlib.ticker import FuncFormatter

    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    width_in, row_in = 16.0, 0.32
    figure = Figure(figsize=(width_in, height * row_in), facecolor=GROUND)
    empty = []
    for panel in panels:
        place, unit = panel["gridPos"], panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "short")
        left, bottom = place["x"] / 24, 1 - (place["y"] + place["h"]) / height
        wide, high = place["w"] / 24, place["h"] / height
        if panel["type"] == "row":
            figure.text(
                left + 0.006,
                bottom + high / 2,
                panel["title"],
                weight="bold",
                size=10,
                color=INK,
                va="center",
            )
            continue
        pad_x, pad_y = 0.003, 0.06 / (height * row_in)
        box = (left + pad_x, bottom + pad_y, wide - 2 * pad_x, high - 2 * pad_y)
        figure.patches.append(
            FancyBboxPatch(
                box[:2],
                *box[2:],
                boxstyle="square,pad=0",
                fc=PANEL,
                ec=FAINT,
                transform=figure.transFigure,
                zorder=-1,
            )
        )
        top = box[1] + box[3]
        figure.text(
            box[0] + 0.006, top - 0.16 / (height * row_in), panel["title"], size=8.5, color=INK, va="center"
        )
        series = [
            (legend(target["legendFormat"], labels), points)
            for target in panel["targets"]
            for labels, points in ask(prometheus, target["expr"], end - 60 * minutes, end)
            if points
        ]
        if not series:
            empty.append(panel["title"])
        if panel["type"] == "stat":
            text = shown(series[0][1][-1][1], unit) if series else "–"
            figure.text(
                box[0] + box[2] / 2,
                box[1] + 0.42 * box[3],
                text,
                size=19,
                ha="center",
                va="center",
                color=COLOURS[0],
            )
            continue
        names = max(1, math.ceil(len(series) / 3))
        room = (0.32 + 0.17 * names) / (height * row_in)
        axes = figure.add_axes(
            (box[0] + 0.042, box[1] + room, box[2] - 0.05, box[3] - room - 0.3 / (height * row_in))
        )
        for number, (name, points) in enumerate(series):
            axes.plot(
                *zip(*points, strict=True),
                lw=1,
                color=COLOURS[number % len(COLOURS)],
                label=name or panel["title"],
            )
        axes.set_ylim(bottom=0)
        axes.set_xlim(-60 * minutes, 0)
        axes.grid(color=FAINT, lw=0.5)
        axes.tick_params(labelsize=6.5, colors=INK, length=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place, unit=unit: shown(value, unit)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.0f} s"))
        for spine in axes.spines.values():
            spine.set_visible(False)
        if series:
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(-0.1, -0.12),
                ncols=3,
                fontsize=6,
                frameon=False,
                handlelength=1,
                columnspacing=1,
                borderaxespad=0,
                labelspacing=0.25,
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return empty


def main() -> None:
    """Draws, and says what was missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prometheus")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--until", type=float, default=time.time(), help="seconds since 1970; by default now")
    options = parser.parse_args()
    empty = draw(options.prometheus, options.out, options.minutes, options.until)
    if missing := [title for title in empty if title not in QUIET]:
        raise SystemExit(f"nothing to show in: {', '.join(missing)}")


if __name__ == "__main__":
    main()
