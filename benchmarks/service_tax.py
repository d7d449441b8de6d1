"""Claim: three processes cost little over one. `AskImage` against the same pipeline in one process.

    python -m benchmarks.service_tax [--size embedded|0.5b] [--model DIR] [--device cuda] [--pairs N]

Both run the same tower, selection, projector and language model on the same question, in turn, without a
cache. What the services add is gRPC, protobuf, event loops and the batcher's wait; the table says where.
Stages follow one another, so either side has every core to itself while it works.

`0.5b` is CLIP-L/14-336 with a language model of Qwen2-0.5B's size, random weights. The embedded model answers
in under 0.1 s, which a few milliseconds of services weigh heavily on: its figure shows the milliseconds.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import checkpoints, plots, report
from hiprune.checkpoints import open_checkpoint
from hiprune.client import Answer, Client, question_message
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import Stack
from hiprune.telemetry import StageClock, start_clock
from hiprune.v1 import llm_service_pb2, pruner_service_pb2
from services.encoder.families import load_tower
from services.encoder.images import ImageLimits, decode_image
from services.llm import process as llm_process
from services.llm.settings import Settings as LlmSettings
from services.llm.visual import VisualTokens, VisualView
from services.pruner import policy as policies
from services.pruner import selection

CLAIM: Final = {
    "embedded": "AskImage through three processes costs little over the same pipeline in one process",
    "0.5b": "with a model of LLaVA-0.5B's size, AskImage through three processes takes at most 1.05 of the "
    "time of the same pipeline in one process",
}
LIMIT: Final = 1.05
WEIGHTS: Final = {"embedded": "trained weights", "0.5b": "random weights"}
LIMITS: Final = ImageLimits(max_bytes=2**24, max_pixels=2**26, max_side=2**14)
SAMPLE: Final = EMBEDDED_MODEL.parents[1] / "samples" / "scene00.png"
QUESTION: Final = "which colour is the circle ?"


class OneProcess:
    """The pipeline without services: the same modules, called one after the other."""

    def __init__(self, model: str, device: str) -> None:
        self._checkpoint = open_checkpoint(model)
        self._tower = load_tower(self._checkpoint, None, torch.device(device), report.dtype_on(device))
        facts = self._checkpoint.facts
        self._tower.warm_up({facts.object_layer, facts.deep_layer})
        self._policy = policies.resolve(pruner_service_pb2.PrunePolicy(), self._checkpoint.facts)
        self._model = llm_process.load(LlmSettings.read(["--model", model, "--device", device], {}))

    async def start(self) -> None:
        """Loads the language model."""
        await self._model.engine.start()

    async def ask(self, image: bytes, max_tokens: int) -> str:
        """The answer to QUESTION."""
        clock: StageClock = start_clock()
        model = self._model
        request = model.read(
            [question_message(QUESTION, [image])],
            llm_service_pb2.Sampling(max_tokens=max_tokens),
            "",
            media="media",
        )
        # on the language model's own thread: a second one would bring a second team of torch's, which waits
        # for the first to rest, as no pipeline in one process would be written
        visual = await asyncio.get_running_loop().run_in_executor(model.engine._pool, self._see, image)
        text = ""
        async for event in model.answer(request, [visual], clock):
            if isinstance(event, llm_service_pb2.TextDelta):
                text += event.text
        return text

    def _see(self, image: bytes) -> VisualTokens:
        """The kept tokens of an image."""
        facts = self._checkpoint.facts
        item = self._tower.prepare(decode_image(image, limits=LIMITS, field="image"))
        layers = {facts.object_layer, facts.deep_layer}
        ((view,),) = self._tower.encode([item], layers, [False])
        (keep,) = self._policy.keep_per_view([len(view.features)])
        kept = selection.hiprune(
            view.scores[facts.object_layer].numpy(),
            view.scores[facts.deep_layer].numpy(),
            width=view.grid[1],
            keep=keep,
            alpha=self._policy.alpha,
        )
        features = view.features[torch.from_numpy(kept.indices)]
        kept_view = VisualView(features, torch.from_numpy(kept.indices), view.grid)
        return VisualTokens((kept_view,), item.layout, "image")


def hops_of(answer: Answer) -> dict[str, float]:
    """Milliseconds that each hop adds: what the caller saw less what the callee spent."""
    image = report.stage_ms(answer.report.media[0].timings)
    text = report.stage_ms(answer.completion.timings)
    encoder = image["preprocess"] + image["vision"]
    pruner = image["encode"] + image["select"] + image["cache_get"]
    llm = image["prune"] + text["project"] + text["prefill"] + text["decode"]
    return {
        "client → llm": answer.total_s * 1000 - llm,
        "llm → pruner": image["prune"] - pruner,
        "pruner → encoder, queue": image["encode"] - encoder,
    }


async def measure(model: str, device: str, count: int, warm_up: int, max_tokens: int) -> dict[str, Any]:
    """Runs both in turn."""
    image = SAMPLE.read_bytes()
    sampling = llm_service_pb2.Sampling(max_tokens=max_tokens)
    alone = OneProcess(model, device)
    await alone.start()
    services: list[float] = []
    single: list[float] = []
    hops: list[dict[str, float]] = []
    environ = {
        "HIPRUNE_PRUNER_CACHE": "off",
        "HIPRUNE_ENCODER_DEVICE": device,
        "HIPRUNE_LLM_DEVICE": device,
        **{f"HIPRUNE_{service}_PAIRED_MODEL": "none" for service in ("ENCODER", "PRUNER")},
        **{f"HIPRUNE_{service}_DEFAULT_DEADLINE_MS": "600000" for service in ("ENCODER", "PRUNER", "LLM")},
    }
    with Stack(model=model, redis=False, environ=environ) as stack:
        async with Client(stack.address, timeout_s=600) as client:
            for number in report.track(range(warm_up + count), "three processes and one"):
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    begun = time.perf_counter()
                    if which == 0:
                        answer = await client.ask(QUESTION, image, sampling=sampling)
                        taken, text = time.perf_counter() - begun, answer.text
                    else:
                        other = await alone.ask(image, max_tokens)
                        taken, other_text = time.perf_counter() - begun, other
                    if number >= warm_up:
                        (services, single)[which].append(taken)
                if text != other_text:
                    raise SystemExit(f"the two answers differ: {text!r} and {other_text!r}")
                if number >= warm_up:
                    hops.append(hops_of(answer))
    return {
        "ratio": report.ratios(services, single),
        "three_processes_ms": report.spread([1000 * value for value in services]),
        "one_process_ms": report.spread([1000 * value for value in single]),
        "hops_ms": {name: statistics.median(hop[name] for hop in hops) for name in hops[0]},
    }


@contextmanager
def model_of(size: str) -> Iterator[str]:
    """The directory of a model of this size; what was written for it goes away."""
    if size == "embedded":
        yield str(EMBEDDED_MODEL)
        return
    with checkpoints.temporary() as folder:
        config = checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.qwen2_0_5b())
        yield str(checkpoints.write_llava(folder / "llava-0.5b", config))


def show(results: dict[str, Any], name: str) -> None:
    """The table and the plot."""
    report.table(
        f"service tax: × {results['ratio']['median']:.2f} (median of pairs)",
        ("", "ms"),
        [
            ("three processes", results["three_processes_ms"]["median"]),
            ("one process", results["one_process_ms"]["median"]),
            *((f"  {hop}", value) for hop, value in results["hops_ms"].items()),
        ],
    )
    totals = {
        "three processes": results["three_processes_ms"]["median"],
        "one process": results["one_process_ms"]["median"],
    }
    panels = [
        plots.Panel(x="AskImage, ms", bars=totals, title=f"× {results['ratio']['median']:.2f}"),
        plots.Panel(x="added, ms", bars=results["hops_ms"], title="by hop"),
    ]
    plots.plot(name, panels)


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--size", default="embedded", choices=tuple(CLAIM))
    parser.add_argument("--model", type=Path, help="another directory in place of the size's own")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--pairs", type=int, help="default: 40, of 0.5b 12")
    parser.add_argument("--warm-up", type=int, help="default: 5, of 0.5b 2")
    parser.add_argument("--max-tokens", type=int, help="default: 16, of 0.5b 8")
    options = parser.parse_args()
    large = options.size == "0.5b"
    count = options.pairs or (12 if large else 40)
    warm_up = (2 if large else 5) if options.warm_up is None else options.warm_up
    max_tokens = options.max_tokens or (8 if large else 16)
    with model_of(options.size) as own:
        model = str(options.model or own)
        results = asyncio.run(measure(model, options.device, count, warm_up, max_tokens))
    name = options.name or report.name_on("service_tax_0_5b" if large else "service_tax", options.device)
    targets = []
    if large:
        targets.append(report.target("three processes / one", results["ratio"]["median"], LIMIT))
    show(results, name)
    report.print_targets(targets)
    settings = {
        "size": options.size,
        "model": model.rsplit("/", 1)[-1] if options.model else f"{options.size}, {WEIGHTS[options.size]}",
        "dtype": str(report.dtype_on(options.device)).removeprefix("torch."),
        "pairs": count,
        "warm_up": warm_up,
        "max_tokens": max_tokens,
        "cache": "off",
    }
    path = report.write(name, CLAIM[options.size], settings, results, device=options.device, targets=targets)
    print(path)


if __name__ == "__main__":
    main()
