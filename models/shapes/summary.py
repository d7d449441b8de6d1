"""From records of single answers to the figures that are reported. Knows no model and runs nothing.

Accuracy is the share of greedy answers that are the truth, word for word. A mean is over question types, each
counting alike. See `intervals` for how sure each figure is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hiprune import layer_choice
from models.shapes.evaluate import Found, Record
from models.shapes.intervals import Bootstrap, Estimate, Matrix, estimate, wilson
from models.shapes.questions import TYPES
from models.shapes.variants import Variant

NONE: Final = "none"
RANDOM: Final = "random"
STRIDED: Final = "strided"

_Mask = npt.NDArray[np.bool_]


def accuracy(records: Sequence[Record], variants: Sequence[Variant], seed: int) -> list[dict[str, Any]]:
    """A row for each method and budget, RANDOM's draws in one, in the order of `variants`."""
    asked = _asked(records)
    bootstrap = Bootstrap(asked, seed)
    places: dict[tuple[str, str], list[int]] = {}
    for place, variant in enumerate(variants):
        if variant.group == "methods":
            places.setdefault((variant.name, variant.budget), []).append(place)
    rights = {key: _right_of(records, some) for key, some in places.items()}
    whole = bootstrap.mean(rights[NONE, "all"])
    rows = []
    for (name, budget), some in places.items():
        right = rights[name, budget]
        means = bootstrap.mean(right)
        row = {
            "method": name,
            "budget": budget,
            "tokens": round(_mean(records, some, lambda found: found.tokens), 1),
            "draws": len(some),
            "mean": estimate(means).content(),
            "by_type": _by_type(bootstrap, asked, right),
            "foreground": round(_mean(records, some, lambda found: found.foreground), 4),
            "covered": round(_covered(records, some), 4),
            "counted": _counted(records, some),
        }
        if name != NONE:
            row["minus_unpruned"] = estimate(means - whole).content()
            if whole.all():  # an untrained model may have nothing to keep
                row["of_unpruned"] = estimate(means / whole).content()
        for control in (RANDOM, STRIDED):
            if name not in {NONE, control} and (control, budget) in rights:
                row[f"minus_{control}"] = estimate(means - bootstrap.mean(rights[control, budget])).content()
        rows.append(row)
    return rows


def plus_plus(records: Sequence[Record], variants: Sequence[Variant], seed: int, budget: str) -> Estimate:
    """HiPrune++'s mean accuracy less HiPrune's at a budget."""
    bootstrap = Bootstrap(_asked(records), seed)
    one, other = (
        bootstrap.mean(_right_of(records, [_place(variants, name, budget)]))
        for name in ("hiprune++", "hiprune")
    )
    return estimate(one - other)


def ablated(records: Sequence[Record], variants: Sequence[Variant], seed: int) -> dict[str, Any]:
    """Every ablation, by group and budget: its mean accuracy, and the difference to the defaults."""
    some = [record for record in records if len(record.found) == len(variants)]
    bootstrap = Bootstrap(_asked(some), seed)
    means = {
        place: bootstrap.mean(_right_of(some, [place]))
        for place, variant in enumerate(variants)
        if variant.group != "methods"
    }
    served = {
        (variant.group, variant.budget): means[place]
        for place, variant in enumerate(variants)
        if variant.served
    }
    rows = [
        {
            "group": variants[place].group,
            "name": variants[place].name,
            "budget": variants[place].budget,
            "served": variants[place].served,
            "mean": estimate(mean).content(),
            "minus_served": estimate(mean - served[variants[place].group, variants[place].budget]).content(),
            "foreground": round(_mean(some, [place], lambda found: found.foreground), 4),
            "covered": round(_covered(some, [place]), 4),
        }
        for place, mean in means.items()
    ]
    return {"scenes": len(some), "questions": sum(len(record.types) for record in some), "rows": rows}


def layers(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of each layer: how its attention meets the objects that scenes know, and what is seen without."""
    views = [layer_choice.View(record.scores, record.grid) for record in records]
    rows = []
    for profile in layer_choice.profiles(views):
        layer = profile.layer
        row = {
            "layer": layer,
            "iou": _over_scenes([_iou(record.scores[layer], record.owners) for record in records]),
            "lift": _over_scenes([_lift(record.scores[layer], record.owners) for record in records]),
            "distance": round(profile.distance, 4),
            "clumps": round(profile.clumps, 4),
            "habit": round(profile.habit, 4),
            "attention": round(profile.attention, 4),
            "merit": round(profile.merit, 4),
        }
        with_cls = [record for record in records if record.cls]
        if with_cls:
            row["iou_cls"] = _over_scenes([_iou(record.cls[layer], record.owners) for record in with_cls])
            row["lift_cls"] = _over_scenes([_lift(record.cls[layer], record.owners) for record in with_cls])
        rows.append(row)
    return rows


def proposals(
    records: Sequence[Record], deep_layer: int, seed: int, pictures: int, times: int = 50
) -> dict[str, int]:
    """How often each layer is proposed from so many pictures, drawn `times` times."""
    draw = np.random.default_rng([seed, 4])
    counts: dict[str, int] = {}
    for _ in range(times):
        chosen = draw.choice(len(records), min(pictures, len(records)), replace=False)
        views = [layer_choice.View(records[place].scores, records[place].grid) for place in chosen]
        layer = str(layer_choice.suggest(layer_choice.profiles(views), deep_layer))
        counts[layer] = counts.get(layer, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: int(pair[0])))


def _asked(records: Sequence[Record]) -> Matrix:
    """Questions by scene and type, (S, T)."""
    return np.array([[record.types.count(kind) for kind in TYPES] for record in records], dtype=np.float64)


def _right_of(records: Sequence[Record], places: Sequence[int]) -> Matrix:
    """Right answers by scene and type, mean over `places`, (S, T)."""
    counts = np.zeros((len(records), len(TYPES)))
    for row, record in enumerate(records):
        for place in places:
            for kind, truth, said in zip(record.types, record.truths, record.found[place].said, strict=True):
                counts[row, TYPES.index(kind)] += said == truth
    return counts / len(places)


def _by_type(bootstrap: Bootstrap, asked: Matrix, right: Matrix) -> dict[str, dict[str, float]]:
    """Accuracy of each type that was asked.

    Where all or none are right every draw is the same: there it is Wilson's, of as many as scenes were asked.
    """
    accuracies = bootstrap.accuracies(right)
    found = {}
    for order, kind in enumerate(TYPES):
        scenes = int(np.count_nonzero(asked[:, order]))
        if scenes:
            share = float(accuracies[0, order])
            certain = share in {0.0, 1.0}
            among = wilson(share * scenes, scenes) if certain else estimate(accuracies[:, order])
            found[kind] = among.content()
    return found


def _place(variants: Sequence[Variant], name: str, budget: str) -> int:
    return next(
        place
        for place, variant in enumerate(variants)
        if (variant.group, variant.name, variant.budget) == ("methods", name, budget)
    )


def _mean(records: Sequence[Record], places: Sequence[int], of: Any) -> float:
    return float(np.mean([of(record.found[place]) for record in records for place in places]))


def _covered(records: Sequence[Record], places: Sequence[int]) -> float:
    """Share of the questions whose things are all shown by a kept token."""
    found: list[Found] = [record.found[place] for record in records for place in places]
    return float(np.mean([each for one in found for each in one.covered]))


def _counted(records: Sequence[Record], places: Sequence[int]) -> float | None:
    """Mean of what is answered less the truth, over questions for a number that a number answers."""
    errors = [
        int(said) - int(truth)
        for record in records
        for place in places
        for kind, truth, said in zip(record.types, record.truths, record.found[place].said, strict=True)
        if kind == "count" and said.isdecimal()
    ]
    return round(float(np.mean(errors)), 3) if errors else None


def _iou(scores: npt.NDArray[np.float32], owners: npt.NDArray[np.int64]) -> float:
    """Of the top tenth of tokens with the tokens that show a thing."""
    top: _Mask = layer_choice.top_tokens(scores)
    thing = owners > 0
    return float((top & thing).sum() / (top | thing).sum())


def _lift(scores: npt.NDArray[np.float32], owners: npt.NDArray[np.int64]) -> float:
    """The things' share of attention over their share of tokens; NaN where no token shows one."""
    thing = owners > 0
    return float(scores[thing].sum() / scores.sum() / thing.mean()) if thing.any() else float("nan")


def _over_scenes(values: Sequence[float]) -> dict[str, float]:
    """The mean with its interval by the normal distribution: scenes are independent."""
    some = np.array([value for value in values if np.isfinite(value)])
    half = 1.96 * float(some.std(ddof=1)) / np.sqrt(some.size) if some.size > 1 else 0.0
    middle = float(some.mean())
    return Estimate(middle, middle - float(half), middle + float(half)).content()
