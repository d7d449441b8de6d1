"""Claim: with a third, two ninths and a ninth of the visual tokens answers begin sooner; choice is cheap.

    python -m benchmarks.latency [--device cuda] [--shape 0.5b|7b] [--rounds N]

The paper's table of latency (LLaVA-1.5-7B: 576, 192, 128 and 64 visual tokens), from the services' own parts
in one process: the encoder's tower, the pruner's selection with its text encoder, the llm's projector, prompt
and engine `transformers`. Each budget is measured with HiPrune, HiPrune++ and the random control, which tells
what the choice costs from what the number of tokens gains. Random weights; answers of a fixed length.

All variants run in turn within a round, forwards, then backwards; figures are medians over the rounds, and
ratios are of one round's own unpruned answer, each behind the median of the tower as its method needs it:
alone, with scores, for HiPrune++ with aligned tokens too. Prefill is until the first token, decoding from
there to the last. Throughput is of several questions at once, each a thread of the engine: it makes no
batches.

On a CPU CLIP-L/14-336 with a language model of Qwen2-0.5B's size, on a GPU LLaVA-1.5-7B's, unless `--shape`
says. The whole run writes a checkpoint of random weights first: 1.6 GB, at 7b 14 GB.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from benchmarks import checkpoints, plots, report
from hiprune import tensors
from hiprune.budgets import Budget
from hiprune.checkpoints import open_checkpoint
from hiprune.client import question_message
from hiprune.costs import Media
from hiprune.costs import Model as Costed
from hiprune.v1 import encoder_service_pb2, llm_service_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from services.encoder.families import EncodedView, load_tower
from services.llm.engines.base import Job
from services.llm.pipeline import LanguageModel
from services.llm.process import load
from services.llm.sampling import Sampling
from services.llm.settings import Settings
from services.pruner import policy as policies
from services.pruner.pruning import NO_QUESTION, Guidance, prune, similarities
from services.pruner.text import PairedTextEncoder

CLAIM: Final = (
    "with a third, two ninths and a ninth of the visual tokens answers begin sooner and hold less memory, "
    "and HiPrune's and HiPrune++'s choice costs little of what a random one gains"
)
SHARES: Final = (Fraction(1, 3), Fraction(2, 9), Fraction(1, 9))
"""192, 128 and 64 of 576."""
METHODS: Final = {
    "hiprune": pb.METHOD_HIPRUNE,
    "hiprune++": pb.METHOD_HIPRUNE_PLUS_PLUS,
    "random": pb.METHOD_RANDOM,
}
_M_ARENA_MAX: Final = -8  # malloc.h
TOWER_OF: Final = {"none": "without", "random": "without", "hiprune": "with_scores", "hiprune++": "aligned"}
"""What of `vision_ms` a method needs."""
QUESTION: Final = "what color is the large circle to the left of the small square ?"
AT_ONCE: Final = {"cpu": (1, 2, 4), "cuda": (1, 4, 16)}
NEW_TOKENS: Final = {"cpu": 8, "cuda": 32}
SHAPES: Final[dict[str, Callable[[], Any]]] = {
    "0.5b": lambda: checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.qwen2_0_5b()),
    "7b": lambda: checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.llama_7b()),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A method and how many visual tokens it keeps."""

    method: str
    keep: int

    @property
    def policy(self) -> pb.PrunePolicy:
        """As a request has it."""
        number = METHODS.get(self.method, pb.METHOD_NONE)
        return pb.PrunePolicy(method=number, keep_count=self.keep)


@dataclass(frozen=True, slots=True)
class Answered:
    """One question, stage by stage."""

    select_ms: float
    """The text encoder's part with it, for hiprune++."""
    project_ms: float
    prefill_ms: float
    decode_ms: float
    """A token behind the first."""
    prompt_tokens: int


class Pipeline:
    """The parts of the services, loaded once."""

    def __init__(self, path: Path, paired: Path, device: str, *, new_tokens: int, at_once: int) -> None:
        self.device, self.new_tokens = device, new_tokens
        one_arena()
        endless(path)
        arguments = ["--model", str(path), "--device", device, f"--max-concurrency={at_once}"]
        self.model: LanguageModel = load(Settings.read(arguments, {}))
        self.checkpoint = open_checkpoint(str(path))
        self.tower = load_tower(self.checkpoint, paired, torch.device(device), report.dtype_on(device))
        self.text = PairedTextEncoder(paired)
        self.layers = {self.checkpoint.facts.object_layer, self.checkpoint.facts.deep_layer}
        for layers in (self.layers, set[int]()):  # with scores and without
            self.tower.warm_up(layers)
        side = int(self.checkpoint.config["vision_config"]["image_size"])
        self.picture = self.tower.prepare(Image.effect_noise((side, side), 64).convert("RGB"))
        ((self.encoded,),) = self.tower.encode([self.picture], self.layers, [True])
        self.view = message_of(self.encoded, self.layers)
        self.tokens = self.encoded.grid[0] * self.encoded.grid[1]
        asked = self.model.read(
            [question_message(QUESTION, [b"-"])], llm_service_pb2.Sampling(), "", media="media"
        )
        self.prompt = asked.prompt

    def variants(self) -> list[Variant]:
        """Everything, then each share by each method."""
        keeps = [round(share * self.tokens) for share in SHARES]
        return [Variant("none", self.tokens), *(Variant(name, keep) for keep in keeps for name in METHODS)]

    def vision_ms(self, rounds: int) -> dict[str, float]:
        """Milliseconds of the tower alone, recording scores, and with aligned tokens beside them."""
        ways: dict[str, tuple[set[int], bool]] = {
            "without": (set(), False),
            "with_scores": (self.layers, False),
            "aligned": (self.layers, True),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for layers, aligned in ways.values():
            self.tower.encode([self.picture], layers, [aligned])
        for number in range(rounds):
            for name, (layers, aligned) in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
                work = partial(self.tower.encode, [self.picture], layers, [aligned])
                times[name].append(report.seconds(work, self.device))
        return {name: 1000 * statistics.median(each) for name, each in times.items()}

    def pruned(self, variant: Variant) -> pb.PrunedMedia:
        """What the pruner answers."""
        policy = policies.resolve(variant.policy, self.checkpoint.facts)
        guidance = NO_QUESTION
        if policy.reads_text:
            vector = self.text.encode(QUESTION)
            assert vector is not None
            guidance = Guidance(similarities([self.view], vector), self.text.name)
        found = prune([self.view], policy, guidance, seed=b"latency")
        digest = self.checkpoint.vision_digest
        return pb.PrunedMedia(views=found.views, summary=found.summary, vision_digest=digest)

    def job(self, media: pb.PrunedMedia) -> Job:
        """What the engine is given."""
        visual = self.model.read_pruned(media, "media")
        prompt = self.model._assemble(self.prompt, [visual])
        return Job(prompt, self.prompt.token_ids, Sampling(), self.new_tokens)

    async def answer(self, variant: Variant) -> Answered:
        """One question, alone."""
        begun = time.perf_counter()
        media = self.pruned(variant)
        selected = time.perf_counter()
        job = self.job(media)
        report.synchronize(self.device)
        projected = time.perf_counter()
        times = [time.perf_counter() async for _ in self.model.engine.generate(job)]
        self._check(len(times))
        return Answered(
            select_ms=1000 * (selected - begun),
            project_ms=1000 * (projected - selected),
            prefill_ms=1000 * (times[0] - projected),
            decode_ms=1000 * (times[-1] - times[0]) / (len(times) - 1),
            prompt_tokens=len(job.prompt.embeddings),
        )

    async def peak_mb(self, variant: Variant) -> float | None:
        """The most that an answer holds above the weights, prompt and all; None where nobody tells.

        Apart from what is timed: memory that was just given back has to be fetched again.
        """
        with report.PeakMemory(self.device) as peak:
            job = self.job(self.pruned(variant))
            self._check(len([step async for step in self.model.engine.generate(job)]))
        return None if peak.bytes is None else peak.bytes / report.MB

    async def questions_per_s(self, variant: Variant, at_once: int) -> float:
        """Of as many at a time, each pruned for itself, the tower left out."""

        async def one() -> None:
            job = await asyncio.to_thread(lambda: self.job(self.pruned(variant)))
            self._check(len([step async for step in self.model.engine.generate(job)]))

        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(at_once)))
        return at_once / (time.perf_counter() - begun)

    def _check(self, tokens: int) -> None:
        if tokens != self.new_tokens:
            raise SystemExit(f"an answer of {tokens} tokens, expected {self.new_tokens}")


def one_arena() -> None:
    """Has glibc keep one heap for all threads: of others it never gives back what is free at their end."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def endless(path: Path) -> None:
    """Takes the end tokens out of a checkpoint, so that answers are as long as they may be."""
    file = path / "generation_config.json"
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**content, "eos_token_id": None}), "utf-8")


def message_of(view: EncodedView, layers: set[int]) -> encoder_service_pb2.View:
    """A view as the encoder answers it."""
    message = encoder_service_pb2.View(grid_height=view.grid[0], grid_width=view.grid[1])
    tensors.fill(message.features, view.features)
    if view.aligned is not None:
        tensors.fill(message.aligned, view.aligned)
    for layer in sorted(layers):
        tensors.fill(message.attention.add(layer=layer).scores, view.scores[layer])
    return message


async def measure(
    pipeline: Pipeline, *, rounds: int, at_once: Sequence[int], description: str = ""
) -> dict[str, Any]:
    """All variants, in turn."""
    await pipeline.model.engine.start()
    try:
        return await _measure(pipeline, rounds, at_once, description)
    finally:
        await pipeline.model.engine.stop()


async def _measure(
    pipeline: Pipeline, rounds: int, at_once: Sequence[int], description: str
) -> dict[str, Any]:
    variants = pipeline.variants()
    vision = pipeline.vision_ms(rounds)
    answers: dict[Variant, list[Answered]] = {variant: [] for variant in variants}
    await pipeline.answer(variants[0])  # kernels, and the largest shapes, once
    with report.progress(description, rounds * len(variants)) as step:
        for number in range(rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                answers[variant].append(await pipeline.answer(variant))
                step()
    # how tokens were chosen does not change how fast they are read: one method is enough here
    loaded = [variants[0], *(each for each in variants if each.method == "hiprune")]
    rates: dict[Variant, dict[int, list[float]]] = {each: {} for each in loaded}
    turns = [(variant, count) for count in at_once for variant in loaded]
    with report.progress(f"{description}, at once" if description else "", 2 * len(turns)) as step:
        for turn in (turns, turns[::-1]):
            for variant, count in turn:
                rates[variant].setdefault(count, []).append(await pipeline.questions_per_s(variant, count))
                step()
    peaks = {variant: await pipeline.peak_mb(variant) for variant in loaded}
    costed = Costed.of(pipeline.checkpoint.config)
    medians = {
        variant: {count: statistics.median(each) for count, each in found.items()}
        for variant, found in rates.items()
    }
    number_bytes = report.dtype_on(pipeline.device).itemsize
    rows = []
    for variant, found in answers.items():
        texts = found[0].prompt_tokens - variant.keep
        costs = costed.costs(
            Media(), Budget(keep_count=variant.keep), text_tokens=texts, number_bytes=number_bytes
        )
        rows.append(
            {
                "method": variant.method,
                "visual_tokens": variant.keep,
                "prompt_tokens": found[0].prompt_tokens,
                "prefill_tflops": costs.after.prefill / 1e12,
                "select_ms": report.spread([each.select_ms for each in found]),
                "project_ms": report.spread([each.project_ms for each in found]),
                "prefill_ms": report.spread([each.prefill_ms for each in found]),
                "decode_ms_per_token": report.spread([each.decode_ms for each in found]),
                "first_token_ratio": report.ratios(
                    until_first_token(found, vision[TOWER_OF[variant.method]]),
                    until_first_token(answers[variants[0]], vision["without"]),
                ),
                "peak_mb": peaks.get(variant),
                "kv_mb": costs.after.kv_bytes / report.MB,
                "questions_per_s": {str(count): each for count, each in medians.get(variant, {}).items()},
                "best_at_once": max(medians[variant], key=medians[variant].__getitem__)
                if variant in medians
                else None,
            }
        )
    weights = {part: size / report.MB for part, size in costs.weights_bytes.items()}
    return {"vision_ms": vision, "weights_mb": weights, "rows": rows}


def until_first_token(answers: Sequence[Answered], vision_ms: float) -> list[float]:
    """Milliseconds from pixels to the first token of each answer, behind a tower of `vision_ms`."""
    return [vision_ms + each.select_ms + each.project_ms + each.prefill_ms for each in answers]


def targets_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the claim is held to: pruning pays, selection counted, and HiPrune costs what chance does."""
    by_name = {(row["method"], row["visual_tokens"]): row for row in rows}
    targets = []
    for (method, keep), row in by_name.items():
        if method in {"hiprune", "hiprune++"}:
            ratio = row["first_token_ratio"]["median"]
            targets.append(report.target(f"{method}, {keep} tokens: until the first token", ratio, 0.9))
        if method == "hiprune":
            chance = by_name["random", keep]["first_token_ratio"]["median"]
            what = f"{method}, {keep} tokens: until the first token, beside a random choice"
            targets.append(report.target(what, row["first_token_ratio"]["median"] / chance, 1.1))
    return targets


def show(results: dict[str, Any], name: str, title: str) -> None:
    """The table and the plot."""
    rows = results["rows"]
    counts = list(rows[0]["questions_per_s"])
    table = [
        (
            f"{row['visual_tokens']} {row['method']}",
            row["select_ms"]["median"],
            row["prefill_ms"]["median"],
            row["first_token_ratio"]["median"],
            row["decode_ms_per_token"]["median"],
            "" if row["peak_mb"] is None else row["peak_mb"],
            *(row["questions_per_s"].get(count, "") for count in counts),
        )
        for row in rows
    ]
    headings = ("tokens", "select ms", "prefill ms", "×", "decode ms", "MB", *(f"q/s, {c}" for c in counts))
    report.table(title, headings, table)
    print(
        f"the tower: {results['vision_ms']['with_scores']:.0f} ms with scores, "
        f"{results['vision_ms']['aligned']:.0f} ms with aligned tokens too, "
        f"{results['vision_ms']['without']:.0f} ms without either"
    )
    bars = {f"{row['visual_tokens']} {row['method']}": row["first_token_ratio"]["median"] for row in rows}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for count, rate in row["questions_per_s"].items():
            lines.setdefault(f"{count} at once", []).append((row["visual_tokens"], rate))
    panels = [
        plots.Panel(x="until the first token, against all tokens", title=title, bars=bars, limit=1.0),
        plots.Panel(x="visual tokens", y="questions / s", lines=lines),
    ]
    plots.plot(name, panels)


def main() -> None:
    """Writes a checkpoint, measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: 0.5b, on cuda 7b")
    parser.add_argument("--rounds", type=int, help="default: 3, on cuda 5")
    parser.add_argument("--at-once", type=int, nargs="+", help="questions; default: 1 2 4, on cuda 1 4 16")
    parser.add_argument("--new-tokens", type=int, help="an answer's; default: 8, on cuda 32")
    options = parser.parse_args()
    device = options.device
    shape = options.shape or ("0.5b" if device == "cpu" else "7b")
    rounds = options.rounds or (3 if device == "cpu" else 5)
    at_once, new_tokens = options.at_once or AT_ONCE[device], options.new_tokens or NEW_TOKENS[device]
    with checkpoints.temporary() as folder:
        path = checkpoints.write_llava(folder / "model", SHAPES[shape]())
        paired = checkpoints.write_clip(folder / "clip")
        pipeline = Pipeline(path, paired, device, new_tokens=new_tokens, at_once=max(at_once))
        title = f"LLaVA of {shape.upper()}"
        results = asyncio.run(measure(pipeline, rounds=rounds, at_once=at_once, description=title))
        texts = results["rows"][0]["prompt_tokens"] - pipeline.tokens
        dtype = str(report.dtype_on(device)).removeprefix("torch.")
    name = report.name_on(f"latency_{shape.replace('.', '_')}", device)
    targets = targets_of(results["rows"])
    show(results, name, title)
    report.print_targets(targets)
    settings = {
        "weights": "random",
        "shape": shape,
        "dtype": dtype,
        "engine": "transformers",
        "text_tokens": texts,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "at_once": list(at_once),
    }
    peak = report.matmul_peak(device, report.dtype_on(device))
    results = {"matmul_peak_tflops": peak, **results}
    print(report.write(name, CLAIM, settings, results, device=device, targets=targets))


if __name__ == "__main__":
    main()
