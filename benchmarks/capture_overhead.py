"""Claim: capturing two layers' scores costs next to nothing in time or memory.

    python -m benchmarks.capture_overhead [--device cuda] [--pairs 10]

CLIP-L/14-336, LLaVA-1.5's tower, with random weights, three ways:

- with capture: the encoder's own tower, SDPA, ended at layer 23, scores of layers 9 and 23;
- without: the same tower, no scores;
- the authors' way: all 24 layers on eager attention, attention matrices of every layer, the two layers'
  column sums taken from them.

Beside them the scores by themselves, from queries and keys of the tower's shape: what the pairs should show
where a machine is too noisy to see a hundredth. Features must not change by a bit when scores are captured,
and the run ends if they do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import checkpoints, plots, report
from hiprune.checkpoints import open_checkpoint
from hiprune.loading import load_part
from services.encoder import attention
from services.encoder.families import EncodedView, Prepared, Tower, load_tower

CLAIM: Final = (
    "scores of two layers cost at most 5 % of the tower's time; beside the authors' eager attention the "
    "tower takes at most 0.3 of the memory and, on a CPU, no more time"
)
LAYERS: Final = frozenset({9, 23})
_TOKENS, _HEADS, _WIDTH, _ALONE = 577, 16, 64, 50
TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of scores against the authors', relative to the largest: eager attention rounds to the tower's dtype."""


class Captured:
    """The encoder's tower."""

    def __init__(self, path: Path, device: str, batch: int) -> None:
        self._tower: Tower = load_tower(
            open_checkpoint(str(path)), None, torch.device(device), report.dtype_on(device)
        )
        self._items = [self._tower.prepare(picture(number)) for number in range(batch)]

    def warm_up(self) -> None:
        """As the service does at start, with scores and without: on a GPU both may run as CUDA graphs."""
        for layers in (LAYERS, frozenset[int]()):
            self._tower.warm_up(layers)

    def items(self) -> list[Prepared]:
        """The images, prepared."""
        return self._items

    def run(self, layers: frozenset[int]) -> list[EncodedView]:
        """One view an image."""
        views = self._tower.encode(self._items, layers, [False] * len(self._items))
        return [view for (view,) in views]


class Authors:
    """As the authors run it (arXiv 2508.00553): transformers' eager attention, every layer's matrix."""

    def __init__(self, path: Path, device: str, items: list[Prepared]) -> None:
        checkpoint = open_checkpoint(str(path))
        config = CLIPVisionConfig(**checkpoint.config["vision_config"])
        config._attn_implementation = "eager"
        self._pixels = torch.cat([item.pixels for item in items]).to(device, report.dtype_on(device))
        self._model = load_part(
            CLIPVisionModel,
            path,
            part="vision tower",
            config=config,
            key_mapping={checkpoint.facts.vision_keys.pattern: ""},
            dtype=report.dtype_on(device),
        ).to(device)

    @torch.inference_mode()
    def run(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Features (B, N, D) and each layer's scores (B, N), on the CPU."""
        output = self._model(self._pixels, output_attentions=True, output_hidden_states=True)
        scores = {layer: output.attentions[layer - 1].mean(dim=1).sum(dim=1)[:, 1:].cpu() for layer in LAYERS}
        return output.hidden_states[-2][:, 1:].cpu(), scores


def picture(number: int) -> Image.Image:
    """One of the sample scenes."""
    files = sorted(checkpoints.SAMPLES.glob("*.png"))
    with Image.open(files[number % len(files)]) as opened:
        return opened.convert("RGB")


def peak_of(path: str, device: str, batch: int, which: str) -> int | None:
    """Bytes above the loaded weights in a run of one of the three ways. Runs in a fresh process.

    On a CPU in the first one; on a GPU in the second, libraries having taken their workspaces.
    """
    ours = Captured(Path(path), device, batch)
    work: Callable[[], object]
    if which == "authors":
        items = ours.items()
        del ours
        gc.collect()
        work = Authors(Path(path), device, items).run
    else:
        layers = LAYERS if which == "captured" else frozenset()

        def work() -> object:
            return ours.run(layers)

    if device != "cpu":
        work()
    with report.PeakMemory(device) as peak:
        work()
    return peak.bytes


def check(ours: Captured, authors: Authors, dtype: torch.dtype) -> dict[str, float]:
    """Ends the run unless features are equal bit by bit with and without capture, and scores are right."""
    with_scores, without = ours.run(LAYERS), ours.run(frozenset())
    for one, other in zip(with_scores, without, strict=True):
        if not torch.equal(one.features, other.features):
            raise SystemExit("features change when scores are captured")
    _, expected = authors.run()
    worst = {}
    for layer in sorted(LAYERS):
        found = torch.stack([view.scores[layer] for view in with_scores])  # (B, N)
        off = (found - expected[layer].float()).abs().max() / expected[layer].abs().max()
        worst[str(layer)] = float(off)
        if off > TOLERANCE[dtype]:
            raise SystemExit(f"layer {layer}: scores differ from eager attention's by {off:.2g}")
    return worst


def scores_alone_ms(device: str, batch: int) -> dict[str, float]:
    """Milliseconds of one layer's scores, of all queries and of the CLS, laid out as CLIP's are."""
    dtype = report.dtype_on(device)
    drawn = torch.randn(2, batch, _TOKENS, _HEADS * _WIDTH).to(device, dtype)
    query, key = drawn.view(2, batch, _TOKENS, _HEADS, _WIDTH).transpose(2, 3)  # (B, heads, N, d) each

    def work() -> None:
        attention.column_sums(query, key, scaling=_WIDTH**-0.5)
        attention.first_row(query, key, scaling=_WIDTH**-0.5)

    return report.spread([1000 * report.seconds(work, device) for _ in range(_ALONE)][_ALONE // 5 :])


def times(path: Path, device: str, batch: int, count: int, warm_up: int) -> dict[str, Any]:
    """The checks, and the three ways in interleaved pairs."""
    ours = Captured(path, device, batch)
    ours.warm_up()
    authors = Authors(path, device, ours.items())
    difference = check(ours, authors, report.dtype_on(device))
    settings: Any = {"count": count, "warm_up": warm_up, "device": device}
    truncated = report.compare(
        lambda: ours.run(LAYERS),
        lambda: ours.run(frozenset()),
        description=f"with and without capture, batch {batch}",
        **settings,
    )
    eager = report.compare(
        lambda: ours.run(LAYERS), authors.run, description=f"the authors' way, batch {batch}", **settings
    )
    return {
        "features_equal_bit_by_bit": True,
        "scores_differ_from_eager_by": difference,
        "time_against_no_capture": truncated,
        "time_against_authors": eager,
    }


def measure(path: Path, device: str, batch: int, count: int, warm_up: int) -> dict[str, Any]:
    """All figures of one batch size."""
    row = {"batch": batch, **times(path, device, batch, count, warm_up)}
    alone = scores_alone_ms(device, batch)
    plain_ms = row["time_against_no_capture"]["second_ms"]["median"]
    row |= {"scores_of_a_layer_ms": alone, "scores_share": len(LAYERS) * alone["median"] / plain_ms}
    gc.collect()  # the towers, before others are loaded beside them
    if device != "cpu":
        torch.cuda.empty_cache()
    peaks = {
        which: report.in_child(peak_of, str(path), device, batch, which)
        for which in report.track(("captured", "plain", "authors"), "peak memory")
    }
    return {
        **row,
        "peak_mb": {which: None if peak is None else peak / report.MB for which, peak in peaks.items()},
    }


def targets_of(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What the claim is held to, for each batch size."""
    found = []
    for row in rows:
        batch, peaks = row["batch"], row["peak_mb"]
        ratio = None if None in peaks.values() else peaks["captured"] / peaks["authors"]
        found += [
            report.target(
                f"time with capture / without, batch {batch}",
                row["time_against_no_capture"]["ratio"]["median"],
                1.05,
            ),
            report.target(f"peak memory / the authors', batch {batch}", ratio, 0.3),
        ]
        if device == "cpu":
            measured = row["time_against_authors"]["ratio"]["median"]
            found.append(report.target(f"time / the authors', batch {batch}", measured, 1.0))
    return found


def show(rows: list[dict[str, Any]], name: str) -> None:
    """The table and the plot."""
    ways = ("captured", "plain", "authors")
    words = {"captured": "with capture", "plain": "without", "authors": "the authors' way"}
    for row in rows:
        times = {
            "captured": row["time_against_no_capture"]["first_ms"]["median"],
            "plain": row["time_against_no_capture"]["second_ms"]["median"],
            "authors": row["time_against_authors"]["second_ms"]["median"],
        }
        report.table(
            f"CLIP-L/14-336, batch {row['batch']}",
            ("", "ms", "MB above the weights"),
            [
                *((words[way], times[way], row["peak_mb"][way] or "–") for way in ways),
                ("a layer's scores, alone", row["scores_of_a_layer_ms"]["median"], ""),
            ],
        )
    first = rows[0]
    bars = {
        "time with capture\n/ without": first["time_against_no_capture"]["ratio"]["median"],
        "time with capture\n/ the authors'": first["time_against_authors"]["ratio"]["median"],
    }
    peaks = first["peak_mb"]
    panels = [plots.Panel(x="ratio of times", bars=bars, limit=1.0)]
    if None not in peaks.values():
        memory = {words[way]: peaks[way] for way in ways}
        panels.append(plots.Panel(x="peak memory above the weights, MB", bars=memory))
    plots.plot(name, panels)


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", help="images a forward; default: 1, on cuda 1 8")
    options = parser.parse_args()
    device = options.device
    batches = options.batches or ([1] if device == "cpu" else [1, 8])
    with checkpoints.temporary() as folder:
        config = checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.qwen2_0_5b())
        path = checkpoints.write_llava(folder / "clip-l-336", config, vision_only=True)
        rows = [measure(path, device, batch, options.pairs, options.warm_up) for batch in batches]
    name = report.name_on("capture_overhead", device)
    targets = targets_of(rows, device)
    show(rows, name)
    report.print_targets(targets)
    settings = {
        "tower": "CLIP-L/14-336, random weights",
        "dtype": str(report.dtype_on(device)).removeprefix("torch."),
        "layers": sorted(LAYERS),
        "pairs": options.pairs,
        "warm_up": options.warm_up,
    }
    print(report.write(name, CLAIM, settings, {"batches": rows}, device=device, targets=targets))


if __name__ == "__main__":
    main()
