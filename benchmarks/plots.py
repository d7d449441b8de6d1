"""Plots of results, as SVG. matplotlib is asked for only when there is something to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import report

INK: Final = "#6e7781"
"""Of text and axes: as far from white as from black, so that a plot without a ground suits both."""
COLOURS: Final = ("#2f81f7", "#d9730d", "#2da44e", "#a371f7", "#cf4a6b", "#8c8c2f")


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. Labels carry their units; `lines` are points by name, `bars` lengths by name.

    `bands` are how sure the line of that name is.
    """

    x: str
    y: str = ""
    title: str = ""
    lines: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)  # x, low, high
    bars: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None  # a dashed line: across at this y, of bars upright at this x
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] = ()  # on x; none: as drawn
    bottom: float = 0.0  # of y, where it is not logarithmic
    legend: bool = True


def plot(name: str, panels: Sequence[Panel], *, folder: Path | None = None, columns: int = 0) -> Path | None:
    """Draws the panels side by side into `results/NAME.svg`; None where there is no matplotlib.

    `columns` panels in a row; 0: all of them.

    No ground and middling ink, so that it reads on light pages and on dark ones.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return None
    style = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": INK,
        "grid.alpha": 0.2,
        "legend.frameon": False,
        "font.size": 9,
        "svg.hashsalt": name,  # the same figures, the same bytes
    }
    with mpl.rc_context(style):
        columns = columns or len(panels)
        rows = math.ceil(len(panels) / columns)
        width = 5 if rows == 1 else 3.4
        figure = Figure(figsize=(width * columns, (3.2 if rows == 1 else 2.6) * rows), layout="constrained")
        every = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in every[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(every, panels, strict=False):
            (_draw_bars if panel.bars else _draw_lines)(axes, panel)
            axes.set_xlabel(panel.x)
            axes.set_ylabel(panel.y)
            axes.set_title(panel.title)
        path = (folder or report.RESULTS) / f"{name}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def _draw_lines(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for colour, (label, points) in zip(COLOURS, panel.lines.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, color=colour)
        if label in panel.bands:
            axes.fill_between(*zip(*panel.bands[label], strict=True), color=colour, alpha=0.15, linewidth=0)
    if panel.limit is not None:
        axes.axhline(panel.limit, color=INK, linestyle="--", linewidth=1)
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if panel.log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.7g}"))
    else:
        axes.set_ylim(bottom=panel.bottom)
    if panel.ticks:
        axes.set_xticks(panel.ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: _size(value)))
    axes.grid(axis="y")
    if len(panel.lines) > 1 and panel.legend:
        axes.legend()


def _draw_bars(axes: Any, panel: Panel) -> None:
    names = list(panel.bars)
    lengths = [panel.bars[each] for each in names]
    drawn = axes.barh(names, lengths, height=0.6, color=[COLOURS[0]] * len(names))
    axes.bar_label(drawn, labels=[report.short(value) for value in lengths], padding=3, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    if panel.limit is not None:
        axes.axvline(panel.limit, color=INK, linestyle="--", linewidth=1)


def _size(value: float) -> str:
    """1024 as 1k, the way that sizes are spoken of."""
    if value >= 1024 and math.isclose(value % 1024, 0):
        return f"{value / 1024:g}k"
    return f"{value:g}"
