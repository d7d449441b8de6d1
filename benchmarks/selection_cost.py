"""Claim: choosing the tokens costs next to nothing beside encoding them.

    python -m benchmarks.selection_cost [--device cuda] [--pairs 10]

- Selection against the tower's forward of the same image, at 576 tokens (CLIP-L/14-336) and at 4k and 16k
  (Qwen2.5-VL-3B's tower). On a CPU the latter tower is not run whole: at 4k its time is that of one block
  of each kind times their counts, at 16k that of its 28 window blocks alone, which is less than it takes.
- HiPrune++ against HiPrune through the real encoder and pruner, no cache: what the text encoder and the
  aligned tokens add to a miss.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import torch
from PIL import Image

from benchmarks import checkpoints, plots, report, tower_scaling
from hiprune.calls import connect
from hiprune.checkpoints import open_checkpoint
from hiprune.stack import Stack
from hiprune.v1 import media_pb2, pruner_service_pb2, pruner_service_pb2_grpc
from services.encoder.families import load_tower
from services.pruner import selection

CLAIM: Final = (
    "selection takes at most 1 % of the tower's forward at 576, 4k and 16k tokens; HiPrune++ with its text "
    "encoder adds at most 10 % to a miss"
)
QUESTION: Final = "what color is the large circle to the left of the small square ?"
RATIO: Final = 0.3
SIDES: Final = (24, 64, 128)
METHODS: Final = ("METHOD_HIPRUNE", "METHOD_HIPRUNE_PLUS_PLUS")


# --- selection -------------------------------------------------------------------------------------------


def scores_of(side: int, seed: int) -> selection.Scores:
    """Scores (N,) like a tower's: positive, N in sum, most of it on a few tokens, smooth over the grid."""
    field = np.random.default_rng(seed).standard_normal((side, side))
    for axis in (0, 1):  # neighbours see alike
        field = field + np.roll(field, 1, axis) + np.roll(field, -1, axis)
    received = np.exp(1.5 * field / field.std())
    scores: selection.Scores = (received / received.mean()).ravel().astype(np.float32)
    return scores


def selection_ms(side: int, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of HiPrune and of HiPrune++ (its similarity given) over a square grid."""
    object_scores, deep_scores, similarity = (scores_of(side, seed) for seed in range(3))
    keep = round(RATIO * side * side)
    works: dict[str, Callable[[], object]] = {
        "hiprune": lambda: selection.hiprune(object_scores, deep_scores, width=side, keep=keep),
        "hiprune_plus_plus": lambda: selection.hiprune_plus_plus(
            object_scores, deep_scores, similarity, width=side, keep=keep
        ),
    }
    return {
        name: report.spread([1000 * report.seconds(work) for _ in range(count)])
        for name, work in works.items()
    }


def clip_tower_s(path: Path, device: str, count: int) -> float:
    """Seconds of the encoder's CLIP-L/14-336 with one image, scores captured."""
    checkpoint = open_checkpoint(str(path))
    tower = load_tower(checkpoint, None, torch.device(device), report.dtype_on(device))
    item = tower.prepare(Image.effect_noise((336, 336), 64).convert("RGB"))
    layers = {checkpoint.facts.object_layer, checkpoint.facts.deep_layer}

    def work() -> object:
        return tower.encode([item], layers, [False])

    tower.warm_up(layers)
    for _ in range(3):
        work()
    times = [report.seconds(work, device) for _ in report.track(range(count), "CLIP-L/14-336")]
    return report.spread(times)["median"]


def qwen_tower_on_cpu_s(side: int, whole: bool) -> tuple[float, str]:
    """Seconds of Qwen2.5-VL-3B's tower from one block of a kind, or less; and how they were come by."""
    vision = checkpoints.qwen2_5_vl_3b().vision_config.to_dict()
    tokens = side * side
    window = report.in_child(tower_scaling.block_run, vision, tokens, "window")["seconds"] or math.nan
    seconds = tower_scaling.WINDOW_BLOCKS * window
    if not whole:
        return seconds, "at least: 28 × one window block"
    full = report.in_child(tower_scaling.block_run, vision, tokens, "plain")["seconds"] or math.nan
    return seconds + tower_scaling.FULL_BLOCKS * full, "28 × one window block and 4 × one full"


def measure_selection(options: argparse.Namespace, folder: Path, clip_l: Path) -> list[dict[str, Any]]:
    """A row for each grid."""
    device = options.device
    rows = []
    qwen = None
    if device == "cuda":
        qwen = checkpoints.write_qwen2_5_vl(
            folder / "qwen2.5-vl-3b", checkpoints.qwen2_5_vl_3b(), vision_only=True
        )
    for side in SIDES[: options.sizes]:
        if side == SIDES[0]:
            tower_s, how = clip_tower_s(clip_l, device, options.pairs), "measured"
        elif qwen is not None:
            work = tower_scaling.Ways(qwen, side * side, device).make("captured")
            times = [report.seconds(work, device) for _ in range(3 + options.pairs)][3:]
            tower_s, how = report.spread(times)["median"], "measured"
        else:
            tower_s, how = qwen_tower_on_cpu_s(side, whole=side == SIDES[1])
        selected = selection_ms(side, options.selections)
        rows.append(
            {
                "tokens": side * side,
                "selection_ms": selected,
                "tower_ms": 1000 * tower_s,
                "tower": "CLIP-L/14-336" if side == SIDES[0] else "Qwen2.5-VL-3B",
                "tower_time_is": how,
                "share": selected["hiprune"]["median"] / (1000 * tower_s),
            }
        )
    return rows


# --- HiPrune++ -------------------------------------------------------------------------------------------


async def measure_text(address: str, count: int, warm_up: int) -> dict[str, Any]:
    """Misses of both methods, in interleaved pairs, and the median stages of each."""
    images = [path.read_bytes() for path in sorted(checkpoints.SAMPLES.glob("*.png"))]
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    stages: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    async with connect(address) as channel:
        stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
        for number in report.track(range(warm_up + count), "PruneImage, both methods"):
            for method in METHODS if number % 2 == 0 else METHODS[::-1]:
                taken, found = await _prune(stub, images[number % len(images)], method)
                if number >= warm_up:
                    times[method].append(1000 * taken)
                    stages[method].append(found)
    plain, guided = (times[method] for method in METHODS)
    return {
        "ratio": report.ratios(guided, plain),
        "hiprune_ms": report.spread(plain),
        "hiprune_plus_plus_ms": report.spread(guided),
        "stages_ms": {
            method.removeprefix("METHOD_").lower(): {
                stage: report.spread([each[stage] for each in stages[method]])["median"]
                for stage in stages[method][0]
            }
            for method in METHODS
        },
    }


async def _prune(stub: Any, image: bytes, method: str) -> tuple[float, dict[str, float]]:
    request = pruner_service_pb2.PruneImageRequest(
        media=media_pb2.Media(image=image),
        policy=pruner_service_pb2.PrunePolicy(
            method=pruner_service_pb2.Method.Value(method), keep_ratio=RATIO
        ),
        question=QUESTION,
    )
    begun = time.perf_counter()
    try:
        answer = await stub.PruneImage(request, timeout=600)
    except grpc.aio.AioRpcError as error:
        raise SystemExit(f"PruneImage: {error.details()}") from error
    taken = time.perf_counter() - begun
    if answer.cache != pruner_service_pb2.CACHE_STATUS_MISS:
        raise SystemExit("a miss was to be measured, and the cache answered")
    return taken, report.stage_ms(answer.timings)


def through_services(model: Path, clip: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Starts an encoder and a pruner, and measures."""
    environ = {
        "HIPRUNE_PRUNER_CACHE": "off",
        "HIPRUNE_ENCODER_DEVICE": options.device,
        "HIPRUNE_ENCODER_PAIRED_MODEL": str(clip),
        "HIPRUNE_PRUNER_PAIRED_MODEL": str(clip),
    }
    stack = Stack(model=str(model), redis=False, environ=environ)
    try:
        for service in ("encoder", "pruner"):
            stack.start_service(service)
        for service in ("encoder", "pruner"):
            stack.wait_ready(service)
        return asyncio.run(measure_text(stack.pruner_address, options.pairs, options.warm_up))
    finally:
        stack.stop()


# --- the answer ------------------------------------------------------------------------------------------


def targets_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    found = [
        report.target(f"selection / tower at {row['tokens']} tokens", row["share"], 0.01)
        for row in results["selection"]
    ]
    return [*found, report.target("HiPrune++ / HiPrune, a miss", results["text"]["ratio"]["median"], 1.10)]


def show(results: dict[str, Any], name: str) -> None:
    """The tables and the plot."""
    rows, text = results["selection"], results["text"]
    report.table(
        "selection against the tower",
        ("tokens", "HiPrune, ms", "HiPrune++, ms", "tower, ms", "share, %"),
        [
            (
                row["tokens"],
                row["selection_ms"]["hiprune"]["median"],
                row["selection_ms"]["hiprune_plus_plus"]["median"],
                row["tower_ms"],
                100 * row["share"],
            )
            for row in rows
        ],
    )
    for row in rows:
        print(f"the tower's time at {row['tokens']} tokens, {row['tower']}: {row['tower_time_is']}")
    stages = list(dict.fromkeys(stage for each in text["stages_ms"].values() for stage in each))
    report.table(
        f"HiPrune++ against HiPrune, a miss: × {text['ratio']['median']:.3f}",
        ("ms", "HiPrune", "HiPrune++"),
        [
            ("whole call", text["hiprune_ms"]["median"], text["hiprune_plus_plus_ms"]["median"]),
            *(
                (f"  {stage}", *(each.get(stage, "–") for each in text["stages_ms"].values()))
                for stage in stages
            ),
        ],
    )

    def line(method: str) -> list[tuple[float, float]]:
        return [(row["tokens"], row["selection_ms"][method]["median"]) for row in rows]

    tower = [(row["tokens"], row["tower_ms"]) for row in rows]
    lines = {"tower": tower, "HiPrune++": line("hiprune_plus_plus"), "HiPrune": line("hiprune")}
    ticks = [row["tokens"] for row in rows]
    common: Any = {"log_x": True, "log_y": True, "ticks": ticks, "x": "visual tokens"}
    bars = {"HiPrune": text["hiprune_ms"]["median"], "HiPrune++": text["hiprune_plus_plus_ms"]["median"]}
    panels = [
        plots.Panel(y="time, ms", lines=lines, title="selection and the tower", **common),
        plots.Panel(x="PruneImage without a cache, ms", bars=bars, title="through encoder and pruner"),
    ]
    plots.plot(name, panels)


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--selections", type=int, default=100, help="times that each selection runs")
    parser.add_argument("--sizes", type=int, default=3, choices=(1, 2, 3), help="of 576, 4k and 16k tokens")
    options = parser.parse_args()
    with checkpoints.temporary() as folder:
        config = checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.qwen2_0_5b())
        clip_l = checkpoints.write_llava(folder / "clip-l-336", config, vision_only=True)
        clip = checkpoints.write_clip(folder / "clip-text")
        results = {
            "selection": measure_selection(options, folder, clip_l),
            "text": through_services(clip_l, clip, options),
        }
    name = report.name_on("selection_cost", options.device)
    targets = targets_of(results)
    show(results, name)
    report.print_targets(targets)
    settings = {
        "towers": "CLIP-L/14-336 and Qwen2.5-VL-3B's, random weights",
        "text_encoder": "CLIP-L/14-336's, random weights, float32 on the CPU",
        "dtype": str(report.dtype_on(options.device)).removeprefix("torch."),
        "keep_ratio": RATIO,
        "question_words": len(QUESTION.split()),
        "pairs": options.pairs,
        "warm_up": options.warm_up,
        "selections": options.selections,
        "cache": "off",
    }
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
