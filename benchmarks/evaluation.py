"""Claim: a third of the visual tokens answers nearly as well as all of them, and the page says where not.

    python -m benchmarks.evaluation [--model DIR] [--scenes 320] [--seed 0]

The same held-out questions about the same scenes, for every method that the service knows at the paper's
budgets; the controls beside the methods; the paper's ablations; and how each layer's attention meets the
objects, which scenes know. Writes `evaluation`, `evaluation_ablations` and `evaluation_layers`, each with a
plot, and reads nothing but the model. `hiprune evaluate` is this. Greedy answers, right when they are the
truth word for word; see `models.shapes`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import plots, report

CLAIM: Final = (
    "at a third of the tokens HiPrune keeps at least 95 % of the unpruned accuracy, and at a ninth HiPrune++ "
    "is no worse than HiPrune"
)
SCENES: Final = 320
ABLATION_SCENES: Final = 100
QUESTIONS_EACH: Final = 2
PICTURES: Final = 8
"""From how many a layer is proposed, where its steadiness is tried."""

BUDGETS: Final = {"all": 1.0, "1/3": 1 / 3, "2/9": 2 / 9, "1/9": 1 / 9, "1/18": 1 / 18}


def measure(
    model: str,
    *,
    scenes: int = SCENES,
    ablation_scenes: int = ABLATION_SCENES,
    seed: int = 0,
    workers: int = 0,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Examines a model: `settings`, `accuracy`, `ablations` and `layers`. `step` is called after each scene.

    Raises CheckpointError, StackError; ValueError for fewer scenes than two.
    """
    # seconds to import, and a mistaken option is told before
    from hiprune.checkpoints import digest_of_all, open_checkpoint
    from models.shapes import summary
    from models.shapes.evaluate import Plan, run
    from models.shapes.questions import TYPES

    if scenes < 2:
        raise ValueError(f"scenes: got {scenes}, expected at least 2")
    checkpoint = open_checkpoint(model)
    facts = checkpoint.facts
    plan = Plan(model, scenes, min(ablation_scenes, scenes), QUESTIONS_EACH, seed)
    variants = plan.variants()
    begun = time.monotonic()
    records = run(plan, workers, step)
    minutes = (time.monotonic() - begun) / 60
    found = summary.layers(records)
    able = [row for row in found if row["layer"] < facts.deep_layer] or found
    results: dict[str, Any] = {
        "settings": {
            "model": checkpoint.name,
            "model_digest": digest_of_all(checkpoint.path),
            "vision_digest": checkpoint.vision_digest,
            "tokens": len(records[0].owners),
            "object_layer": facts.object_layer,
            "deep_layer": facts.deep_layer,
            "layers": facts.layers,
            "scenes": scenes,
            "seed": seed,
            "threads": "one a process",
            "minutes": round(minutes, 1),
        },
        "accuracy": {
            "questions": {
                kind: number
                for kind in TYPES
                if (number := sum(record.types.count(kind) for record in records))
            },
            "rows": summary.accuracy(records, variants, seed),
            "plus_plus_at_ninth": summary.plus_plus(records, variants, seed, "1/9").content(),
        },
        "layers": {
            "rows": found,
            "served": facts.object_layer,
            "deep": facts.deep_layer,
            "best_iou": max(able, key=lambda row: row["iou"]["value"])["layer"],
            "suggested": _suggested(records, facts.deep_layer),
            "proposals": {
                str(count): summary.proposals(records, facts.deep_layer, seed, count)
                for count in (2, PICTURES, 4 * PICTURES)
                if count <= scenes
            },
        },
    }
    if plan.ablation_scenes:
        results["ablations"] = summary.ablated(records, variants, seed)
    return results


def _suggested(records: Sequence[Any], deep_layer: int) -> int:
    from hiprune import layer_choice

    views = [layer_choice.View(record.scores, record.grid) for record in records]
    return layer_choice.suggest(layer_choice.profiles(views), deep_layer)


# --- what is shown ---------------------------------------------------------------------------------------


def row_of(accuracy: dict[str, Any], method: str, budget: str) -> dict[str, Any]:
    """One row of the table. Raises StopIteration where there is none."""
    found: dict[str, Any] = next(
        row for row in accuracy["rows"] if (row["method"], row["budget"]) == (method, budget)
    )
    return found


def targets_of(accuracy: dict[str, Any]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    kept = row_of(accuracy, "hiprune", "1/3").get("of_unpruned", {}).get("value")
    gain = accuracy["plus_plus_at_ninth"]["value"]
    return [
        report.target("HiPrune at 1/3 of the tokens / unpruned", kept, 0.95, least=True),
        report.target("HiPrune++ less HiPrune at 1/9", gain, 0.0, least=True),
    ]


def show(results: dict[str, Any]) -> None:
    """The tables."""
    accuracy = results["accuracy"]
    kinds = list(accuracy["questions"])
    report.table(
        "accuracy, %",
        ("method", "kept", *kinds),
        [
            (
                row["method"],
                row["budget"],
                *(f"{100 * row['by_type'][kind]['value']:.1f}" for kind in kinds),
            )
            for row in accuracy["rows"]
        ],
    )
    report.table(
        "mean over types, %, and in brackets what holds 95 %",
        ("method", "kept", "tokens", "accuracy", "of unpruned", "less random"),
        [
            (
                row["method"],
                row["budget"],
                f"{row['tokens']:g}",
                *(_shown(row.get(name)) for name in ("mean", "of_unpruned", "minus_random")),
            )
            for row in accuracy["rows"]
        ],
    )
    if "ablations" in results:
        report.table(
            f"ablations on {results['ablations']['scenes']} scenes, mean accuracy, %",
            ("", "kept", "accuracy", "less the default"),
            [
                (
                    f"{row['group']}: {row['name']}",
                    row["budget"],
                    f"{100 * row['mean']['value']:.1f}",
                    "default" if row["served"] else _shown(row["minus_served"]),
                )
                for row in results["ablations"]["rows"]
            ],
        )
    layers = results["layers"]
    report.table(
        f"attention by layer: served {layers['served']}, suggested {layers['suggested']}, "
        f"best met objects {layers['best_iou']}",
        ("layer", "IoU", "objects' share / area", "distance", "clumps", "habit", "merit"),
        [
            (
                row["layer"],
                row["iou"]["value"],
                row["lift"]["value"],
                row["distance"],
                row["clumps"],
                row["habit"],
                row["merit"],
            )
            for row in layers["rows"]
        ],
    )


def _shown(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}…{high:.1f})"


def draw(results: dict[str, Any], folder: Path | None = None) -> None:
    """The plots, one for each file of results."""
    plots.plot("evaluation", _accuracy_panels(results), folder=folder, columns=4)
    if "ablations" in results:
        plots.plot("evaluation_ablations", _ablation_panels(results["ablations"]), folder=folder)
    plots.plot("evaluation_layers", _layer_panels(results["layers"]), folder=folder)


def _accuracy_panels(results: dict[str, Any]) -> list[plots.Panel]:
    accuracy, tokens = results["accuracy"], results["settings"]["tokens"]
    whole = row_of(accuracy, "none", "all")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in accuracy["rows"]:
        if row["method"] != "none":
            by_method.setdefault(row["method"], []).append(row)
    ticks = sorted({round(row["tokens"]) for rows in by_method.values() for row in rows})

    def panel(title: str, of: Callable[[dict[str, Any]], dict[str, float]], legend: bool) -> plots.Panel:
        lines, bands = {}, {}
        for method, rows in by_method.items():
            points = [(row["tokens"], of(row)) for row in rows]
            lines[method] = [(x, 100 * found["value"]) for x, found in points]
            bands[method] = [(x, 100 * found["low"], 100 * found["high"]) for x, found in points]
        return plots.Panel(
            x=f"visual tokens of {tokens}",
            y="accuracy, %",
            title=title,
            lines=lines,
            bands=bands,
            limit=100 * of(whole)["value"],
            log_x=True,
            ticks=ticks,
            legend=legend,
        )

    return [
        panel("mean over types", lambda row: row["mean"], True),
        *(panel(kind, lambda row, kind=kind: row["by_type"][kind], False) for kind in accuracy["questions"]),
    ]


def _ablation_panels(ablations: dict[str, Any]) -> list[plots.Panel]:
    def lines(group: str, suffix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        points: dict[str, list[tuple[float, float]]] = {}
        bands: dict[str, list[tuple[float, float, float]]] = {}
        for row in ablations["rows"]:
            if row["group"] == group:
                label, x, mean = f"{row['budget']}{suffix}", float(row["name"]), row["mean"]
                points.setdefault(label, []).append((x, 100 * mean["value"]))
                bands.setdefault(label, []).append((x, 100 * mean["low"], 100 * mean["high"]))
        return points, bands

    # differences are small, so all panels begin a little below the least of all
    bottom = 10 * (100 * min(row["mean"]["low"] for row in ablations["rows"]) // 10)
    panels = []
    swept, swept_bands = lines("object layer", ", alpha 0.1")
    alone, alone_bands = lines("object layer, alpha 1", ", alpha 1")
    panels.append(
        plots.Panel(
            x="object layer",
            y="mean accuracy, %",
            lines=swept | alone,
            bands=swept_bands | alone_bands,
            bottom=bottom,
        )
    )
    for group in ("alpha", "beta"):
        points, bands = lines(group)
        panels.append(plots.Panel(x=group, y="mean accuracy, %", lines=points, bands=bands, bottom=bottom))
    return panels


def _layer_panels(layers: dict[str, Any]) -> list[plots.Panel]:
    rows = layers["rows"]

    def line(of: Callable[[dict[str, Any]], float]) -> list[tuple[float, float]]:
        return [(row["layer"], of(row)) for row in rows]

    def estimates(name: str) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
        return line(lambda row: row[name]["value"]), [
            (row["layer"], row[name]["low"], row[name]["high"]) for row in rows
        ]

    sources = {"from all tokens": ""} | ({"from CLS": "_cls"} if "iou_cls" in rows[0] else {})
    ticks = [row["layer"] for row in rows]
    panels = []
    for name, label in (
        ("iou", "IoU of the top 10 % with objects"),
        ("lift", "objects' share of attention / of area"),
    ):
        found = {source: estimates(name + suffix) for source, suffix in sources.items()}
        panels.append(
            plots.Panel(
                x="layer",
                y=label,
                lines={source: points for source, (points, _) in found.items()},
                bands={source: band for source, (_, band) in found.items()},
                limit=1.0 if name == "lift" else None,
                ticks=ticks,
            )
        )
    seen = {
        "distance (the paper's)": line(lambda row: row["distance"]),
        "clumps": line(lambda row: row["clumps"]),
        "habit": line(lambda row: row["habit"]),
        "merit": line(lambda row: row["merit"]),
    }
    panels.append(plots.Panel(x="layer", y="seen without masks", lines=seen, ticks=ticks))
    return panels


def write(results: dict[str, Any], folder: Path | None = None) -> list[Path]:
    """The files of results; their plots go beside them."""
    settings = results["settings"]
    files = [
        report.write(
            "evaluation",
            CLAIM,
            settings,
            results["accuracy"],
            targets=targets_of(results["accuracy"]),
            folder=folder,
        ),
        report.write(
            "evaluation_layers",
            "attention meets objects in middle layers, and which does so best can be told without masks",
            settings,
            results["layers"],
            folder=folder,
        ),
    ]
    if "ablations" in results:
        files.append(
            report.write(
                "evaluation_ablations",
                "what each choice of the method is worth on this model",
                settings,
                results["ablations"],
                folder=folder,
            )
        )
    return files


def main() -> None:
    """Examines, prints, draws and writes."""
    from hiprune.config import EMBEDDED_MODEL

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--ablation-scenes", type=int, default=ABLATION_SCENES, help="0: no ablations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: benchmarks/results")
    options = parser.parse_args()
    with report.progress("scenes", options.scenes) as step:
        results = measure(
            options.model,
            scenes=options.scenes,
            ablation_scenes=options.ablation_scenes,
            seed=options.seed,
            workers=options.workers,
            step=step,
        )
    publish(results, options.out)


def publish(results: dict[str, Any], folder: Path | None = None) -> None:
    """Prints, writes and draws."""
    show(results)
    report.print_targets(targets_of(results["accuracy"]))
    files = write(results, folder)
    draw(results, folder)
    for path in files:
        print(path)


if __name__ == "__main__":
    main()
