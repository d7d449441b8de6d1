"""Claim: three processes cost little over one. `AskImage` against the same pipeline in one process.

    python -m benchmarks.service_tax [--model DIR] [--pairs 40]

Both run the same tower, selection, projector and language model on the same question, in turn, without a
cache. What the services add is gRPC, protobuf, event loops and the batcher's wait; the table says where.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterable
from typing import Any, Final

import torch

from benchmarks import report
from hiprune.checkpoints import locate_paired, open_checkpoint
from hiprune.client import Answer, Client, question_message
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import Stack
from hiprune.telemetry import StageClock, start_clock
from hiprune.v1 import encoder_service_pb2, llm_service_pb2, pruner_service_pb2
from services.encoder.families import load_tower
from services.encoder.images import ImageLimits, decode_image
from services.llm import process as llm_process
from services.llm.settings import Settings as LlmSettings
from services.llm.visual import VisualTokens, VisualView
from services.pruner import policy as policies
from services.pruner import selection

CLAIM: Final = "AskImage through three processes costs little over the same pipeline in one process"
LIMITS: Final = ImageLimits(max_bytes=2**24, max_pixels=2**26, max_side=2**14)
SAMPLE: Final = EMBEDDED_MODEL.parents[1] / "samples" / "scene00.png"
QUESTION: Final = "which colour is the circle ?"


class OneProcess:
    """The pipeline without services: the same modules, called one after the other."""

    def __init__(self, model: str) -> None:
        self._checkpoint = open_checkpoint(model)
        self._tower = load_tower(
            self._checkpoint, locate_paired("", self._checkpoint), torch.device("cpu"), torch.float32
        )
        self._policy = policies.resolve(pruner_service_pb2.PrunePolicy(), self._checkpoint.facts)
        self._model = llm_process.load(LlmSettings.read(["--model", model], {}))

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
        visual = await asyncio.to_thread(self._see, image)
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


def stage_ms(timings: Iterable[encoder_service_pb2.StageTiming]) -> dict[str, float]:
    """Milliseconds by stage; stages of one name add up."""
    found: dict[str, float] = {}
    for timing in timings:
        found[timing.stage] = found.get(timing.stage, 0.0) + timing.duration.ToMicroseconds() / 1000
    return found


def hops_of(answer: Answer) -> dict[str, float]:
    """Milliseconds that each hop adds: what the caller saw less what the callee spent."""
    image = stage_ms(answer.report.media[0].timings)
    text = stage_ms(answer.completion.timings)
    encoder = image["preprocess"] + image["vision"]
    pruner = image["encode"] + image["select"] + image["cache_get"]
    llm = image["prune"] + text["project"] + text["prefill"] + text["decode"]
    return {
        "client → llm": answer.total_s * 1000 - llm,
        "llm → pruner": image["prune"] - pruner,
        "pruner → encoder, queue": image["encode"] - encoder,
    }


async def measure(model: str, count: int, warm_up: int, max_tokens: int) -> dict[str, Any]:
    """Runs both in turn."""
    image = SAMPLE.read_bytes()
    sampling = llm_service_pb2.Sampling(max_tokens=max_tokens)
    alone = OneProcess(model)
    await alone.start()
    services: list[float] = []
    single: list[float] = []
    hops: list[dict[str, float]] = []
    environ = {"HIPRUNE_PRUNER_CACHE": "off"}
    with Stack(model=model, redis=False, environ=environ) as stack:
        async with Client(stack.address, timeout_s=600) as client:
            for number in range(warm_up + count):
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
        "ratio": report.spread([a / b for a, b in zip(services, single, strict=True)]),
        "three_processes_ms": report.spread([1000 * value for value in services]),
        "one_process_ms": report.spread([1000 * value for value in single]),
        "hops_ms": {name: statistics.median(hop[name] for hop in hops) for name in hops[0]},
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument("--name", default="service_tax", help="name of the result file")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args()
    results = asyncio.run(measure(options.model, options.pairs, options.warm_up, options.max_tokens))
    rows = [
        ("three processes", results["three_processes_ms"]["median"]),
        ("one process", results["one_process_ms"]["median"]),
        *((f"  {name}", value) for name, value in results["hops_ms"].items()),
    ]
    report.table(f"service tax: × {results['ratio']['median']:.2f} (median of pairs)", ("", "ms"), rows)
    settings = {
        "model": "embedded" if options.model == str(EMBEDDED_MODEL) else options.model.rsplit("/", 1)[-1],
        "pairs": options.pairs,
        "warm_up": options.warm_up,
        "max_tokens": options.max_tokens,
        "cache": "off",
    }
    print(report.write(options.name, CLAIM, settings, results))


if __name__ == "__main__":
    main()
