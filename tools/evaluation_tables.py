"""Fills the tables of docs/evaluation.md and of the included model's card from what `hiprune evaluate` wrote.

`python tools/evaluation_tables.py`. A table NAME stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test
holds them to the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGES: Final = (ROOT / "docs" / "evaluation.md", ROOT / "models" / "shapes" / "README.md")

CONTROLS: Final = frozenset({"none", "random", "strided"})

Content = dict[str, Any]


def refreshed(text: str, results: Mapping[str, Content]) -> str:
    """A page with those of the tables that it has made anew. Raises ValueError for unpaired markers."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if (text.count(start), text.count(end)) == (0, 0):
            continue
        if (text.count(start), text.count(end)) != (1, 1):
            raise ValueError(f"expected {start} and {end} once each")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{make(results)}\n{end}{after}"
    if unknown := set(re.findall(r"<!-- /([a-z-]+) -->", text)) - set(TABLES):
        raise ValueError(f"no table {', '.join(sorted(unknown))}")
    return text


def read_results() -> dict[str, Content]:
    """The figures, by the name of their file."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("evaluation*.json"))
    }


def run(results: Mapping[str, Content]) -> str:
    """What was run, on what."""
    content = results["evaluation"]
    settings, hardware, versions = content["settings"], content["hardware"], content["versions"]
    asked = content["results"]["questions"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in asked.items())
    return (
        f"{content['date']}, {hardware['cores']} cores of {hardware['cpu']}, "
        f"{settings['minutes']:g} minutes;\n"
        f"torch {versions['torch']}, transformers {versions['transformers']}. "
        f"Checkpoint `{settings['model_digest'][:12]}` with {settings['tokens']} visual tokens, object layer "
        f"{settings['object_layer']} and deep layer {settings['deep_layer']} of {settings['layers']}; seed "
        f"{settings['seed']}, {settings['scenes']} scenes, {sum(asked.values())} questions: {kinds}."
    )


def verdicts(results: Mapping[str, Content]) -> str:
    """What the claim is held to, and what came of it."""
    accuracy = results["evaluation"]["results"]
    third = _row(accuracy, "hiprune", "1/3")["of_unpruned"]
    ninth = accuracy["plus_plus_at_ninth"]
    gain = f"**{_points(ninth)} points** (95 %: {_range(ninth, True)})"
    lines = [
        f"- At 1/3 of the tokens HiPrune keeps **{_percent(third)} %** of the unpruned accuracy "
        f"(95 %: {_range(third)}), at least 95 % were asked for: **{_met(third, 0.95)}**.",
        f"- At 1/9 HiPrune++ is {gain} from HiPrune, no loss was asked for: **{_met(ninth, 0.0)}**.",
    ]
    for control in ("random", "strided"):
        difference = f"minus_{control}"
        for sign, words in ((-1, "behind"), (1, "ahead of")):
            found = [
                f"{row['method']} at {row['budget']} ({_points(row[difference])})"
                for row in accuracy["rows"]
                if row["method"] not in CONTROLS
                and min(sign * row[difference]["low"], sign * row[difference]["high"]) > 0
            ]
            said = ", ".join(found) or "nothing"
            lines.append(f"- Surely {words} {control.upper()}, in points of accuracy: {said}.")
    return "\n".join(lines)


def accuracy(results: Mapping[str, Content]) -> str:
    """Accuracy by method, budget and type."""
    content = results["evaluation"]["results"]
    kinds = list(content["questions"])
    lines = [
        f"| method | kept | tokens | {' | '.join(kinds)} | mean | 95 % | of unpruned |",
        f"|---|---|---|{'---|' * len(kinds)}---|---|---|",
    ]
    for row in content["rows"]:
        cells = [f"{100 * row['by_type'][kind]['value']:.1f}" for kind in kinds]
        kept = f"{_percent(row['of_unpruned'])} %" if "of_unpruned" in row else ""
        name = row["method"] + (f" ({row['draws']} draws)" if row["draws"] > 1 else "")
        lines.append(
            f"| {name} | {row['budget']} | {row['tokens']:g} | {' | '.join(cells)} | "
            f"**{_percent(row['mean'])}** | {_range(row['mean'])} | {kept} |"
        )
    return "\n".join(lines)


def differences(results: Mapping[str, Content]) -> str:
    """Paired differences, and what explains them."""
    lines = [
        "| method | kept | less unpruned | less random | less strided | things among the kept | "
        "what is asked about is shown | count answered less the true one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["evaluation"]["results"]["rows"]:
        pairs = [
            f"{_points(row[name])} ({_range(row[name], True)})" if name in row else ""
            for name in ("minus_unpruned", "minus_random", "minus_strided")
        ]
        counted = "" if row["counted"] is None else f"{row['counted']:+.2f}"
        lines.append(
            f"| {row['method']} | {row['budget']} | {' | '.join(pairs)} | {100 * row['foreground']:.0f} % | "
            f"{100 * row['covered']:.0f} % | {counted} |"
        )
    return "\n".join(lines)


def ablations(results: Mapping[str, Content]) -> str:
    """Every ablation against the defaults."""
    content = results["evaluation_ablations"]["results"]
    budgets = list(dict.fromkeys(row["budget"] for row in content["rows"]))
    heads = " | ".join(f"{budget}: mean | to the default" for budget in budgets)
    lines = [
        f"On {content['scenes']} of the scenes, {content['questions']} questions; points, 95 % intervals.",
        "",
        f"| | | {heads} |",
        f"|---|---|{'---|---|' * len(budgets)}",
    ]
    by_name: dict[tuple[str, str], dict[str, Content]] = {}
    for row in content["rows"]:
        by_name.setdefault((row["group"], row["name"]), {})[row["budget"]] = row
    last = ""
    for (group, name), rows in by_name.items():
        cells = []
        for budget in budgets:
            row = rows[budget]
            found = row["minus_served"]
            against = "default" if row["served"] else f"{_points(found)} ({_range(found, True)})"
            cells += [_percent(row["mean"]), against]
        lines.append(f"| {group if group != last else ''} | {name} | {' | '.join(cells)} |")
        last = group
    return "\n".join(lines)


def layers(results: Mapping[str, Content]) -> str:
    """Attention and objects by layer, and what is proposed."""
    content = results["evaluation_layers"]["results"]
    lines = [
        "| layer | IoU | from CLS | objects' share / area | from CLS | distance | clumps | habit | merit | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = {content["deep"]: ["deep"]}
    notes.setdefault(content["served"], []).append("default")
    notes.setdefault(content["best_iou"], []).append("meets objects best")
    notes.setdefault(content["suggested"], []).append("**proposed**")
    for row in content["rows"]:
        met = [
            f"{row[name]['value']:.2f}" if name in row else ""
            for name in ("iou", "iou_cls", "lift", "lift_cls")
        ]
        seen = [f"{row[name]:.2f}" for name in ("distance", "clumps", "habit", "merit")]
        note = ", ".join(notes.get(row["layer"], []))
        lines.append(f"| {row['layer']} | {' | '.join(met)} | {' | '.join(seen)} | {note} |")
    apart = abs(content["suggested"] - content["best_iou"])
    near = {0: "the same layer", 1: "one layer apart"}.get(apart, f"{apart} layers apart")
    nearest = min(content["rows"], key=lambda row: row["distance"])["layer"]
    lines += [
        "",
        f"Proposed: layer {content['suggested']}; best met objects before the deep layer: "
        f"{content['best_iou']}, {near}. Least distance, the paper's sign: layer {nearest}.",
    ]
    for count, found in content["proposals"].items():
        shares = ", ".join(f"layer {layer} {times} times" for layer, times in found.items())
        lines.append(f"From {count} pictures, drawn {sum(found.values())} times: {shares}.")
    return "\n".join(lines)


def _row(content: Content, method: str, budget: str) -> Content:
    found: Content = next(
        row for row in content["rows"] if (row["method"], row["budget"]) == (method, budget)
    )
    return found


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['value']:.1f}"


def _points(found: Mapping[str, float]) -> str:
    return f"{100 * found['value']:+.1f}"


def _range(found: Mapping[str, float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * found['low']:{sign}.1f} to {100 * found['high']:{sign}.1f}"


def _met(found: Mapping[str, float], least: float) -> str:
    """Whether a value is at least so much, and whether its interval leaves that open."""
    words = "met" if found["value"] >= least else "missed"
    return f"{words}, not surely" if found["low"] < least <= found["high"] else words


TABLES: Final[Mapping[str, Callable[[Mapping[str, Content]], str]]] = {
    "run": run,
    "verdicts": verdicts,
    "accuracy": accuracy,
    "differences": differences,
    "ablations": ablations,
    "layers": layers,
}


def main() -> None:
    """Rewrites the pages."""
    results = read_results()
    for path in PAGES:
        path.write_text(refreshed(path.read_text("utf-8"), results), "utf-8")


if __name__ == "__main__":
    main()
