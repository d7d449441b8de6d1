"""Claim: at any image size, capturing scores costs little time, and memory that grows with N and not with N².

    python -m benchmarks.tower_scaling [--device cuda] [--tokens 1024 4096 16384]

Qwen2.5-VL-3B's tower with random weights at 1k, 4k and 16k merged tokens, four patches each. On a GPU the
whole tower at every size; on a CPU, where 16k tokens are 170 TFLOPs, the whole at the first size and one
block with attention over the whole image at all sizes: the scores of such a block are what costs.

Against the encoder's own tower stand stock transformers with SDPA, which gives no scores, and with eager
attention, where its matrices fit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionBlock,
)

from benchmarks import checkpoints, plots, report
from hiprune.checkpoints import open_checkpoint
from hiprune.costs import TowerShape
from hiprune.families import facts_of
from hiprune.loading import load_part
from services.encoder import transfers
from services.encoder.attention import ScoreCapture
from services.encoder.families import load_tower

CLAIM: Final = (
    "at 1k, 4k and 16k merged tokens, scores of two layers cost little of the tower's time, and peak memory "
    "grows linearly"
)
MERGED_PIXELS: Final = 28
WINDOW_PATCHES: Final = 64  # 112 pixels a side, of 14 each
FULL_BLOCKS, WINDOW_BLOCKS, CAPTURED_BLOCKS = 4, 28, 2  # of the tower's 32
EAGER_BYTES: Final = {"cpu": 2 * 2**30, "cuda": 32 * 2**30}
"""Largest attention matrix (one block, all heads) that eager attention is let make."""
LINEAR_POWER: Final = 1.1
"""The power of N below which growth is called linear: 2 is quadratic."""


# --- one block -------------------------------------------------------------------------------------------


def block_run(vision: dict[str, Any], tokens: int, way: str) -> dict[str, float | None]:
    """One block over `tokens` merged tokens on the CPU: seconds, and bytes above its weights.

    `way` is "captured", "plain" or "eager", with attention over the whole image, or "window", with
    attention in windows and no scores. Runs in a fresh process.
    """
    config = Qwen2_5_VLVisionConfig(**vision)
    config._attn_implementation = "eager" if way == "eager" else "sdpa"
    torch.manual_seed(0)
    block = Qwen2_5_VLVisionBlock(config).eval().requires_grad_(False)
    # without scores too the tower runs its attention so, windows of one size in one call
    capture = None if way == "eager" else ScoreCapture({1: block.attn}, packed=True)
    layers = {1} if way == "captured" else set[int]()

    def run(merged: int) -> Callable[[], object]:
        patches = 4 * merged
        length = min(patches, WINDOW_PATCHES) if way == "window" else patches
        hidden = torch.randn(patches, config.hidden_size)  # (n, D)
        angles = torch.randn(patches, config.hidden_size // config.num_heads)  # (n, d)
        arguments: Any = {
            "cu_seqlens": torch.arange(0, patches + 1, length, dtype=torch.int32),
            "max_seqlen": length,
            "position_embeddings": (angles.cos(), angles.sin()),
        }

        def work() -> object:
            with torch.inference_mode():
                if capture is None:
                    return block(hidden, **arguments)
                with capture.recording(layers) as scores:
                    block(hidden, **arguments)
                return scores

        return work

    run(64)()  # kernels, threads and their buffers
    work = run(tokens)
    with report.PeakMemory("cpu") as peak:
        taken = report.seconds(work)
    return {"seconds": taken, "bytes": peak.bytes}


def measure_blocks(vision: dict[str, Any], tokens: Sequence[int], repeats: Sequence[int]) -> list[Any]:
    """One block at each size, as often as `repeats` says, each way in turn."""
    ways = ("captured", "plain", "window", "eager")
    plan = []
    for size, count in zip(tokens, repeats, strict=True):
        fits = attention_bytes(size, torch.float32) <= EAGER_BYTES["cpu"]
        for number in range(count):
            order = ways if number % 2 == 0 else ways[::-1]
            plan += [(size, way) for way in order if fits or way != "eager"]
    found: dict[tuple[int, str], list[dict[str, float | None]]] = {}
    for size, way in report.track(plan, "one block"):
        found.setdefault((size, way), []).append(report.in_child(block_run, vision, size, way))
    rows = []
    for size in tokens:
        runs = {way: found[size, way] for way in ways if (size, way) in found}
        times = {way: [each["seconds"] or 0.0 for each in those] for way, those in runs.items()}
        rows.append(
            {
                "merged_tokens": size,
                "seconds": {way: report.spread(values) for way, values in times.items()},
                "ratio": report.ratios(times["captured"], times["plain"]),
                "tower_ratio_estimated": estimated_ratio(
                    *(report.spread(times[way])["median"] for way in ("captured", "plain", "window"))
                ),
                "peak_mb": {way: _mb(those[0]["bytes"]) for way, those in runs.items()},
            }
        )
    return rows


def estimated_ratio(captured: float, plain: float, window: float) -> float:
    """The whole tower's time with capture over that without, from one block each way and their counts."""
    tower = FULL_BLOCKS * plain + WINDOW_BLOCKS * window
    return (tower + CAPTURED_BLOCKS * (captured - plain)) / tower


# --- the whole tower -------------------------------------------------------------------------------------


class Ways:
    """The ways to run one image through the whole tower, each loaded when it is first asked for."""

    def __init__(self, path: Path, tokens: int, device: str) -> None:
        self._path, self._device = path, device
        self._dtype = report.dtype_on(device)
        self._checkpoint = open_checkpoint(str(path))
        facts = self._checkpoint.facts
        self._layers = frozenset({facts.object_layer, facts.deep_layer})
        self._tower = load_tower(self._checkpoint, None, torch.device(device), self._dtype)
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise SystemExit(f"{tokens} tokens are no square")
        self._item = self._tower.prepare(Image.effect_noise((MERGED_PIXELS * side,) * 2, 64).convert("RGB"))
        self._grid = torch.tensor([[1, 2 * side, 2 * side]], device=device)

    def make(self, way: str) -> Callable[[], object]:
        """What runs the image: "captured", "plain", "stock" or "eager"."""
        if way in {"captured", "plain"}:
            layers = self._layers if way == "captured" else frozenset()
            return lambda: self._tower.encode([self._item], layers, [False])
        model = self._stock("eager" if way == "eager" else "sdpa")
        pixels = [self._item.pixels.flatten(0, -2)]  # (n, P)
        device = torch.device(self._device)

        @torch.inference_mode()
        def work() -> object:
            # as the encoder's: the pixels come from the CPU, the features go there
            output = model(transfers.to_device(pixels, device, self._dtype), grid_thw=self._grid)
            return output.pooler_output.cpu()

        return work

    def _stock(self, attention: str) -> Any:
        config = Qwen2_5_VLVisionConfig(**self._checkpoint.config["vision_config"])
        config._attn_implementation = attention
        return load_part(
            Qwen2_5_VisionTransformerPretrainedModel,
            self._path,
            part="vision tower",
            config=config,
            key_mapping={self._checkpoint.facts.vision_keys.pattern: ""},
            dtype=self._dtype,
        ).to(self._device)


def tower_run(path: str, tokens: int, way: str) -> dict[str, float | None]:
    """The whole tower on the CPU, once: seconds, and bytes above its weights. Runs in a fresh process."""
    Ways(Path(path), 64, "cpu").make(way)()
    work = Ways(Path(path), tokens, "cpu").make(way)
    with report.PeakMemory("cpu") as peak:
        taken = report.seconds(work)
    return {"seconds": taken, "bytes": peak.bytes}


def measure_tower_on_cpu(path: Path, tokens: int, repeats: int) -> dict[str, Any]:
    """The whole tower at one size, each way in a process of its own, in turn."""
    ways = ("captured", "plain", "stock")
    plan = [way for number in range(repeats) for way in (ways if number % 2 == 0 else ways[::-1])]
    found: dict[str, list[dict[str, float | None]]] = {way: [] for way in ways}
    for way in report.track(plan, f"the whole tower at {tokens} merged tokens"):
        found[way].append(report.in_child(tower_run, str(path), tokens, way))
    times = {way: [each["seconds"] or 0.0 for each in runs] for way, runs in found.items()}
    return {
        "merged_tokens": tokens,
        "seconds": {way: report.spread(values) for way, values in times.items()},
        "ratio": report.ratios(times["captured"], times["plain"]),
        "ratio_to_stock": report.ratios(times["captured"], times["stock"]),
        "peak_mb": {way: _mb(runs[0]["bytes"]) for way, runs in found.items()},
    }


def measure_tower_on_gpu(path: Path, tokens: int, count: int, warm_up: int) -> dict[str, Any]:
    """The whole tower at one size: interleaved pairs of capture against each other way, and peaks."""
    ways = Ways(path, tokens, "cuda")
    captured = ways.make("captured")
    others = ["plain", "stock"]
    if attention_bytes(tokens, torch.bfloat16) <= EAGER_BYTES["cuda"]:
        others.append("eager")
    row: dict[str, Any] = {"merged_tokens": tokens, "seconds": {}, "peak_mb": {}}
    for way in others:
        other = ways.make(way)
        found = report.compare(
            captured,
            other,
            count=count,
            warm_up=warm_up,
            device="cuda",
            description=f"{tokens} merged tokens, {way}",
        )
        row["ratio" if way == "plain" else f"ratio_to_{way}"] = found["ratio"]
        row["seconds"][way] = _in_seconds(found["second_ms"])
        row["peak_mb"][way] = _peak_mb(other)
        if way == "plain":
            row["seconds"]["captured"] = _in_seconds(found["first_ms"])
            row["peak_mb"]["captured"] = _peak_mb(captured)
        del other
        torch.cuda.empty_cache()
    return row


def attention_bytes(tokens: int, dtype: torch.dtype) -> int:
    """Size of one block's attention matrices over the whole image."""
    return 16 * (4 * tokens) ** 2 * dtype.itemsize


def tower_tflops(vision: dict[str, Any], tokens: int) -> float:
    """Of one forward over a square of `tokens` merged tokens, without scores."""
    config = {"model_type": "qwen2_5_vl", "vision_config": vision}
    side = math.isqrt(tokens)
    return TowerShape.of(config, facts_of(config)).flops([(side, side)]) / 1e12


def _peak_mb(work: Callable[[], object]) -> float | None:
    with report.PeakMemory("cuda") as peak:
        work()
    return _mb(peak.bytes)


def _mb(count: float | None) -> float | None:
    return None if count is None else count / report.MB


def _in_seconds(spread: dict[str, float]) -> dict[str, float]:
    return {key: value if key == "n" else value / 1000 for key, value in spread.items()}


# --- the answer ------------------------------------------------------------------------------------------


def growth(rows: list[dict[str, Any]], way: str) -> dict[str, float] | None:
    """How peak memory grows with merged tokens: a line's fit, and the power of growth."""
    points = [(row["merged_tokens"], row["peak_mb"].get(way)) for row in rows]
    known = [(size, peak) for size, peak in points if peak]
    if len(known) < 2:
        return None
    fit = report.line_fit(*zip(*known, strict=True))
    (first, first_peak), (last, last_peak) = known[0], known[-1]
    return fit | {"tokens_times": last / first, "memory_times": last_peak / first_peak}


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    grown = growth(rows, "captured")
    power = grown["power"] if grown else None
    return [report.target("peak memory grows with N to the power of", power, LINEAR_POWER)]


def show(title: str, rows: list[dict[str, Any]], name: str) -> None:
    """The tables and the plot."""
    words = {
        "captured": "with capture",
        "plain": "without",
        "stock": "stock SDPA",
        "eager": "eager",
        "window": "in windows",
    }
    ways = [way for way in words if any(way in row["seconds"] for row in rows)]
    report.table(
        title,
        ("merged tokens", "", "s", "MB above the weights", "× without"),
        [
            (
                row["merged_tokens"] if way == ways[0] else "",
                words[way],
                row["seconds"][way]["median"],
                row["peak_mb"].get(way) or "–",
                row["ratio"]["median"] if way == "captured" else "",
            )
            for row in rows
            for way in ways
            if way in row["seconds"]
        ],
    )
    for row in rows:
        if "tower_ratio_estimated" in row:
            print(
                f"the whole tower with capture at {row['merged_tokens']} tokens, "
                f"from its blocks: × {row['tower_ratio_estimated']:.3f}"
            )
    sizes = [row["merged_tokens"] for row in rows]

    def lines(of: Callable[[dict[str, Any], str], float | None]) -> dict[str, list[tuple[float, float]]]:
        drawn = {}
        for way in ways:
            points = [(row["merged_tokens"], of(row, way)) for row in rows]
            if known := [(size, value) for size, value in points if value]:
                drawn[words[way]] = known
        return drawn

    common: Any = {"x": "merged tokens", "log_x": True, "log_y": True, "ticks": sizes}
    seconds = lines(lambda row, way: row["seconds"][way]["median"] if way in row["seconds"] else None)
    memory = lines(lambda row, way: row["peak_mb"].get(way))
    panels = [plots.Panel(y="time, s", lines=seconds, title=title, **common)]
    if memory:
        panels.append(plots.Panel(y="peak memory above the weights, MB", lines=memory, **common))
    plots.plot(name, panels)


def measure(options: argparse.Namespace, path: Path, vision: dict[str, Any]) -> dict[str, Any]:
    """Everything, by device."""
    dtype = report.dtype_on(options.device)
    peak = report.matmul_peak(options.device, dtype)
    if options.device == "cpu":
        whole = [measure_tower_on_cpu(path, options.tokens[0], options.tower_repeats)]
        blocks = measure_blocks(vision, options.tokens, options.repeats)
        return {"matmul_peak_tflops": peak, "tower": whole, "block": blocks}
    whole = [measure_tower_on_gpu(path, tokens, options.pairs, options.warm_up) for tokens in options.tokens]
    return {"matmul_peak_tflops": peak, "tower": whole}


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="merged, ascending"
    )
    parser.add_argument(
        "--repeats", type=int, nargs="+", default=[3, 2, 1], help="runs of a block on the CPU at each size"
    )
    parser.add_argument("--tower-repeats", type=int, default=1, help="runs of the whole tower on the CPU")
    parser.add_argument("--pairs", type=int, default=10, help="on cuda")
    parser.add_argument("--warm-up", type=int, default=3, help="on cuda")
    options = parser.parse_args()
    options.repeats = (options.repeats + options.repeats[-1:] * len(options.tokens))[: len(options.tokens)]
    config = checkpoints.qwen2_5_vl_3b()
    with checkpoints.temporary() as folder:
        path = checkpoints.write_qwen2_5_vl(folder / "qwen2.5-vl-3b", config, vision_only=True)
        vision = config.vision_config.to_dict()
        results = measure(options, path, vision)
    for row in results["tower"]:
        row["tflops"] = tower_tflops(vision, row["merged_tokens"])
        row["tflops_per_s"] = {way: row["tflops"] / each["median"] for way, each in row["seconds"].items()}
    name = report.name_on("tower_scaling", options.device)
    rows = results.get("block", results["tower"])
    results["memory_growth"] = {
        way: grown
        for way in ("captured", "plain", "stock", "eager", "window")
        if (grown := growth(rows, way)) is not None
    }
    targets = targets_of(rows)
    if "block" in results:
        whole = results["tower"][0]
        medians = [
            (way, spread["median"], whole["peak_mb"][way] or "–") for way, spread in whole["seconds"].items()
        ]
        report.table(f"the whole tower, {whole['merged_tokens']} merged tokens", ("", "s", "MB"), medians)
    show("one block" if "block" in results else "the whole tower", rows, name)
    report.print_targets(targets)
    settings = {
        "tower": "Qwen2.5-VL-3B's, random weights",
        "dtype": str(report.dtype_on(options.device)).removeprefix("torch."),
        "merged_tokens": options.tokens,
        "repeats": options.repeats if options.device == "cpu" else None,
        "pairs": None if options.device == "cpu" else options.pairs,
    }
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
