"""Claim: pruning pays from the pixels to the first token, scores and selection paid for, at every image size.

    python -m benchmarks.time_to_first_token [--device cuda] [--pairs N]

The same image with 30 % of its visual tokens and with all of them: tower, selection, projector, prefill, in
one process through the production tower and selection; random weights. Pruned, the tower records two layers'
scores; unpruned, it records none. Kept tokens keep their positions where the model's are of two dimensions.

On a GPU LLaVA-1.5-7B (576 tokens) and Qwen2.5-VL-3B (576, 1k, 4k, 16k). On a CPU, at 576 tokens,
CLIP-L/14-336 with a language model of Qwen2-0.5B's size, and Qwen2.5-VL-3B with a quarter of its layers, in
the tower and in the language model.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from transformers import AutoModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from benchmarks import checkpoints, plots, report
from hiprune.budgets import keep_of_ratio
from hiprune.checkpoints import open_checkpoint
from hiprune.costs import TextShape, prefill_flops
from services.encoder.families import Prepared, load_tower
from services.pruner import selection

CLAIM: Final = "with 30 % of the visual tokens the first token comes sooner, scores and selection paid for"
RATIO: Final = 0.3
TEXT_BEFORE, TEXT_AFTER = 8, 24
STAGES: Final = ("vision", "select", "project", "prefill")


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and the sides of the square grids of visual tokens that it sees."""

    name: str
    config: Callable[[], Any]
    sides: tuple[int, ...]


CASES: Final[dict[str, tuple[Case, ...]]] = {
    "cpu": (
        Case(
            "LLaVA-0.5B",
            lambda: checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.qwen2_0_5b()),
            (24,),
        ),
        Case(
            "Qwen2.5-VL-3B, ¼",
            lambda: checkpoints.qwen2_5_vl_3b(depth=8, text_layers=9),
            (24,),
        ),
    ),
    "cuda": (
        Case(
            "LLaVA-1.5-7B",
            lambda: checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.llama_7b()),
            (24,),
        ),
        Case("Qwen2.5-VL-3B", checkpoints.qwen2_5_vl_3b, (24, 32, 64, 128)),
    ),
}


class Pipeline:
    """Pixels to the first token, stage by stage."""

    def __init__(self, folder: Path, config: Any, device: str) -> None:
        dtype = report.dtype_on(device)
        self.is_llava = config.model_type == "llava"
        write = checkpoints.write_llava if self.is_llava else checkpoints.write_qwen2_5_vl
        checkpoint = open_checkpoint(str(write(folder, config, vision_only=True)))
        self._facts = checkpoint.facts
        self._device = device
        self._tower = load_tower(checkpoint, None, torch.device(device), dtype)
        for layers in ({self._facts.object_layer, self._facts.deep_layer}, set[int]()):
            self._tower.warm_up(layers)
        text = config.get_text_config()
        self.shape = TextShape.of(text.to_dict())
        with torch.device(device):
            self._language = AutoModel.from_config(text, dtype=dtype).eval().requires_grad_(False)
            self._projector = LlavaMultiModalProjector(config).to(dtype) if self.is_llava else None
            self._text = torch.randn(TEXT_BEFORE + TEXT_AFTER, text.hidden_size).to(dtype)  # (T, H)
            self._head = self._language.get_input_embeddings().weight  # (vocabulary, H)
            if not config.tie_word_embeddings:
                self._head = torch.randn_like(self._head)

    def picture(self, side: int) -> Prepared:
        """An image of side × side visual tokens, ready for the tower."""
        pixels = 336 if self.is_llava else 28 * side
        return self._tower.prepare(Image.effect_noise((pixels, pixels), 64).convert("RGB"))

    @torch.inference_mode()
    def first_token(self, picture: Prepared, side: int, ratio: float | None) -> dict[str, float]:
        """Seconds of each stage; `ratio` None keeps everything, without scores and selection."""
        facts, device = self._facts, self._device
        clock = _Clock(device)
        with clock.stage("vision"):
            layers = set() if ratio is None else {facts.object_layer, facts.deep_layer}
            ((view,),) = self._tower.encode([picture], layers, [False])
        with clock.stage("select"):
            kept = torch.arange(side * side)  # (K,)
            if ratio is not None:
                found = selection.hiprune(
                    view.scores[facts.object_layer].numpy(),
                    view.scores[facts.deep_layer].numpy(),
                    width=view.grid[1],
                    keep=keep_of_ratio(ratio, side * side),
                )
                kept = torch.from_numpy(found.indices)
        with clock.stage("project"):
            rows = view.features[kept].to(device)  # (K, D)
            if self._projector is not None:
                rows = self._projector(rows)  # (K, H)
        with clock.stage("prefill"):
            prompt = torch.cat((self._text[:TEXT_BEFORE], rows, self._text[TEXT_BEFORE:]))  # (S, H)
            hidden = self._language(
                inputs_embeds=prompt[None],
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long, device=device),
                position_ids=self._positions(kept, side).to(device),  # (1, S) or (3, 1, S)
                use_cache=True,
            ).last_hidden_state[0, -1]  # (H,)
            (self._head @ hidden).argmax().item()
        return clock.seconds

    def _positions(self, kept: torch.Tensor, side: int) -> torch.Tensor:
        """As the services give them: LLaVA's run on, Qwen's stay what they are in the unpruned prompt."""
        if self.is_llava:
            return torch.arange(TEXT_BEFORE + len(kept) + TEXT_AFTER)[None]
        return qwen_positions(kept, side)[:, None]


def qwen_positions(kept: torch.Tensor, side: int) -> torch.Tensor:
    """Time, row and column (3, S) of the text before, the kept tokens (K,) of a square image, the text after.

    Transformers' `get_rope_index` written out for this one prompt: the text goes on behind the longer side.
    """
    before = torch.arange(TEXT_BEFORE).expand(3, -1)
    grid = TEXT_BEFORE + torch.stack((torch.zeros_like(kept), kept // side, kept % side))
    after = TEXT_BEFORE + side + torch.arange(TEXT_AFTER).expand(3, -1)
    return torch.cat((before, grid, after), dim=1)


class _Clock:
    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, what it queued on the device included."""
        begun = time.perf_counter()
        yield
        report.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - begun


def measure(pipeline: Pipeline, side: int, device: str, count: int, warm_up: int) -> dict[str, Any]:
    """One size: interleaved pairs of pruned and unpruned."""
    picture = pipeline.picture(side)
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}

    def run(pruned: bool) -> float:
        found = pipeline.first_token(picture, side, RATIO if pruned else None)
        step()
        runs[pruned].append(found)
        return sum(found.values())

    with report.progress(f"{side * side} visual tokens", 2 * (count + warm_up)) as step:
        pruned, whole = report.pairs(lambda: run(True), lambda: run(False), count=count, warm_up=warm_up)
    stages = {
        word: {
            stage: 1000 * statistics.median(each[stage] for each in runs[which][warm_up:]) for stage in STAGES
        }
        for word, which in (("pruned", True), ("unpruned", False))
    }
    tokens = side * side
    texts = TEXT_BEFORE + TEXT_AFTER
    return {
        "visual_tokens": tokens,
        "kept": keep_of_ratio(RATIO, tokens),
        "ratio": report.ratios(pruned, whole),
        "pruned_ms": report.spread([1000 * value for value in pruned]),
        "unpruned_ms": report.spread([1000 * value for value in whole]),
        "stages_ms": stages,
        "prefill_tflops": {
            "pruned": prefill_flops(pipeline.shape, keep_of_ratio(RATIO, tokens) + texts) / 1e12,
            "unpruned": prefill_flops(pipeline.shape, tokens + texts) / 1e12,
        },
    }


def show(rows: Sequence[dict[str, Any]], name: str) -> None:
    """The table and the plot."""
    table: list[tuple[object, ...]] = []
    for row in rows:
        for word in ("unpruned", "pruned"):
            stages = row["stages_ms"][word]
            table.append(
                (
                    row["model"] if word == "unpruned" else "",
                    row["visual_tokens"] if word == "unpruned" else row["kept"],
                    *(stages[stage] for stage in STAGES),
                    row[f"{word}_ms"]["median"],
                    row["ratio"]["median"] if word == "pruned" else "",
                )
            )
    report.table("time to first token, ms", ("", "tokens", *STAGES, "in all", "×"), table)
    ratios = {f"{row['model']}\n{row['visual_tokens']} tokens": row["ratio"]["median"] for row in rows}
    panels = [plots.Panel(x="time to first token, pruned / unpruned", bars=ratios, limit=1.0)]
    last = [row for row in rows if row["model"] == rows[-1]["model"]]
    if len(last) > 1:
        lines = {
            word: [(row["visual_tokens"], row[f"{word}_ms"]["median"]) for row in last]
            for word in ("unpruned", "pruned")
        }
        ticks = [row["visual_tokens"] for row in last]
        panels.append(
            plots.Panel(
                x="visual tokens",
                y="time to first token, ms",
                title=last[0]["model"],
                lines=lines,
                log_x=True,
                log_y=True,
                ticks=ticks,
            )
        )
    else:
        times = {
            f"{row['model']}\n{word}": row[f"{word}_ms"]["median"]
            for row in rows
            for word in ("unpruned", "pruned")
        }
        panels.append(plots.Panel(x="time to first token, ms", bars=times))
    plots.plot(name, panels)


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--pairs", type=int, help="default: 5, on cuda 10")
    parser.add_argument("--warm-up", type=int, help="default: 1, on cuda 3")
    options = parser.parse_args()
    device = options.device
    count = options.pairs or (5 if device == "cpu" else 10)
    warm_up = (1 if device == "cpu" else 3) if options.warm_up is None else options.warm_up
    rows = []
    for case in CASES[device]:
        with checkpoints.temporary() as folder:
            pipeline = Pipeline(folder / "model", case.config(), device)
        for side in case.sides:
            rows.append({"model": case.name, **measure(pipeline, side, device, count, warm_up)})
        del pipeline
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    name = report.name_on("time_to_first_token", device)
    dtype = report.dtype_on(device)
    targets = [
        report.target(
            f"{row['model']}, {row['visual_tokens']} tokens: pruned / unpruned",
            row["ratio"]["median"],
            1.0,
        )
        for row in rows
    ]
    show(rows, name)
    report.print_targets(targets)
    settings = {
        "weights": "random",
        "dtype": str(dtype).removeprefix("torch."),
        "keep_ratio": RATIO,
        "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        "pairs": count,
        "warm_up": warm_up,
    }
    results = {"matmul_peak_tflops": report.matmul_peak(device, dtype), "cases": rows}
    print(report.write(name, CLAIM, settings, results, device=device, targets=targets))


if __name__ == "__main__":
    main()
