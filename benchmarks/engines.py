"""Claim: vLLM answers many questions at a time faster, and fewer visual tokens make room for more.

    python -m benchmarks.engines [--rounds N] [--draw]

Questions about pictures, 1, 4 and 16 at a time, to the engines transformers and vllm in turn, with all 576
visual tokens and with the 192 that HiPrune keeps; 32 new tokens each, greedy. Then answers are cancelled, to
see when their keys and values are given back.

The checkpoint is a LLaVA-1.5 of random weights. A step of its Llama reads 123 M of them, so that the whole
run takes minutes on two cores, and a token has about as many bytes of keys and values to one of weights as in
LLaVA-1.5-7B. No two pictures are alike and no turn has the owner of another, so vLLM finds no prompt that it
has read before.

It runs where vLLM is, in `.venv-vllm`; `--draw` draws the result, in `.venv`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks import checkpoints, plots, report
from hiprune.client import question_message
from hiprune.costs import TextShape, prefill_flops
from hiprune.v1 import encoder_service_pb2, llm_service_pb2
from services.llm.engines.base import Job
from services.llm.pipeline import LanguageModel
from services.llm.process import load
from services.llm.sampling import Sampling
from services.llm.settings import Settings
from services.llm.visual import VisualTokens, VisualView
from services.pruner import selection

CLAIM: Final = (
    "vLLM answers many questions at a time faster than transformers does, and with a third of the visual "
    "tokens either is faster and holds fewer keys and values"
)
NAME: Final = "engines"
ENGINES: Final = ("transformers", "vllm")
SIDE: Final = 24
KEPT: Final = {"all": SIDE**2, "a third": SIDE**2 // 3}
AT_ONCE: Final = (1, 4, 16)
NEW_TOKENS: Final = 32
CONTEXT: Final = 4096
FLOAT_BYTES: Final = 4
BLOCK: Final = 128
"""Tokens of one of vLLM's blocks on a CPU."""
IDLE_S: Final = 1.5
"""vLLM's processes look for work without a pause for a second after their last step."""


def config() -> Any:
    """LLaVA-1.5 with a Llama of 8 layers, and a tower that nothing here runs."""
    text = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=32064,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,  # answers are as long as they may be
        pad_token_id=0,
    )
    vision = {**checkpoints.CLIP_L_336, "intermediate_size": 1024, "num_hidden_layers": 4}
    return checkpoints.llava(vision, text)


@dataclass
class Turn:
    """What came of one group of questions asked at once."""

    seconds: float
    first: list[float]
    """Seconds to each answer's first token."""
    tokens: list[list[int]]
    blocks: float
    """Largest share of vLLM's blocks that were held."""


@dataclass
class Heard:
    """What vLLM has told of its blocks, and when."""

    shares: list[tuple[float, float]] = field(default_factory=list)

    def listen(self, model: LanguageModel) -> None:
        """From before the engine starts."""
        tell = model.engine._tell  # type: ignore[attr-defined]

        def heard(share: float) -> None:
            self.shares.append((time.perf_counter(), share))
            tell(share)

        model.engine._tell = heard  # type: ignore[attr-defined]

    async def when(self, reached: Callable[[float], bool]) -> float:
        """When a share that is waited for is first told, from now on."""
        place = len(self.shares)
        async with asyncio.timeout(60):
            while True:
                for when, share in self.shares[place:]:
                    if reached(share):
                        return when
                place = len(self.shares)
                await asyncio.sleep(0.0005)


@asynccontextmanager
async def running(path: Path, engine: str, heard: Heard) -> AsyncIterator[LanguageModel]:
    """The model in one of the engines."""
    arguments = ["--model", str(path), "--engine", engine, f"--max-concurrency={max(AT_ONCE)}"]
    if engine == "vllm":
        # a graph compiled for one machine's shapes is not what is compared; both cores for vLLM too
        arguments += ["--vllm-args=--enforce-eager"]
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    model = load(Settings.read(arguments, {}))
    if engine == "vllm":
        heard.listen(model)
    await model.engine.start()
    try:
        yield model
    finally:
        await model.engine.stop()


def jobs(model: LanguageModel, kept: int) -> list[Job]:
    """A question about each of as many pictures as are asked about at once, `kept` tokens of each."""
    made = []
    for number in range(max(AT_ONCE)):
        rng = np.random.default_rng(number)
        scores = [rng.gamma(0.5, size=SIDE**2).astype(np.float32) for _ in range(2)]
        found = selection.everything(SIDE**2)
        if kept < SIDE**2:
            found = selection.hiprune(*scores, width=SIDE, keep=kept)
        indices = torch.from_numpy(np.asarray(found.indices, dtype=np.int64))
        features = torch.from_numpy(rng.standard_normal((SIDE**2, 1024), dtype=np.float32))
        view = VisualView(features[indices], indices, (SIDE, SIDE))
        message = question_message(f"which colour is the circle , and where are the other {number} ?", [b"-"])
        asked = model.read([message], llm_service_pb2.Sampling(), "", media="media").prompt
        prompt = model._assemble(asked, [VisualTokens((view,), encoder_service_pb2.MediaLayout(), "")])
        made.append(Job(prompt, asked.token_ids, Sampling(), NEW_TOKENS))
    return made


async def turn(model: LanguageModel, wanted: Sequence[Job], owner: str, heard: Heard) -> Turn:
    """All of them at once."""
    begun = time.perf_counter()
    first = [0.0] * len(wanted)

    async def one(place: int, job: Job) -> list[int]:
        tokens = []
        async for step in model.engine.generate(job):
            if not tokens:
                first[place] = time.perf_counter() - begun
            tokens.append(step.token)
        return tokens

    owned = [dataclasses.replace(each, owner=owner) for each in wanted]
    tokens = await asyncio.gather(*(one(place, job) for place, job in enumerate(owned)))
    seconds = time.perf_counter() - begun
    if {len(each) for each in tokens} != {NEW_TOKENS}:
        raise SystemExit("an answer has ended before its time")
    shares = [share for when, share in heard.shares if when >= begun]
    return Turn(seconds, first, tokens, max(shares, default=0.0))


async def cancellations(
    model: LanguageModel, wanted: Sequence[Job], count: int, block: float, heard: Heard
) -> dict[str, Any]:
    """Milliseconds from leaving an answer to the first report without its blocks; `block` is one's share.

    Another answer keeps vLLM stepping: it tells what is held at the end of a step, and only then.
    """
    companion = asyncio.create_task(_read(model, _endless(wanted[0], "companion")))
    await heard.when(lambda share: share > 0)
    need = block * (len(wanted[0].prompt.embeddings) // BLOCK)
    times, gaps = [], []
    rng = random.Random(0)
    for number in range(count):
        own = heard.shares[-1][1]
        job = _endless(wanted[1 + number % (len(wanted) - 1)], f"leaves {number}")
        leaving = asyncio.create_task(_read(model, job))
        await heard.when(lambda share, own=own: share >= own + need)
        await asyncio.sleep(rng.uniform(0.2, 0.4))
        begun, held = time.perf_counter(), heard.shares[-1][1]
        last = len(heard.shares)
        leaving.cancel()
        # either may have begun a block meanwhile
        when = await heard.when(lambda share, held=held: share <= held - need + 1.5 * block)
        times.append(1000 * (when - begun))
        told = [when for when, _ in heard.shares[last - 1 :]]
        gaps += [1000 * (after - before) for before, after in pairwise(told)]
        await asyncio.sleep(0.1)
        if companion.done():
            raise SystemExit("the answer that keeps vLLM stepping has ended")
    companion.cancel()
    await asyncio.gather(companion, return_exceptions=True)
    return {
        "ms": report.spread(times),
        "most_ms": max(times),
        "within_100_ms": sum(each <= 100 for each in times),
        "between_reports_ms": report.spread(gaps),
        "most_between_reports_ms": max(gaps),
    }


def _endless(job: Job, owner: str) -> Job:
    return dataclasses.replace(job, max_tokens=CONTEXT - len(job.prompt.embeddings), owner=owner)


async def _read(model: LanguageModel, job: Job) -> None:
    async with aclosing(model.engine.generate(job)) as steps:
        async for _ in steps:
            pass


def read_rate() -> float:
    """Bytes a second at which a matrix of 512 MiB is multiplied with a vector: what decoding does."""
    matrix = torch.randn(2**14, 2**13)
    vector = torch.randn(2**13)
    return matrix.numel() * FLOAT_BYTES / min(report.seconds(lambda: matrix @ vector) for _ in range(10))


def least_seconds(shape: TextShape, prompt: int, at_once: int, flops: float, read: float) -> float:
    """What a group takes at least: prefills at `flops` a second, steps that read weights and keys once."""
    width = shape.heads * shape.head_dim + shape.key_value_heads * shape.head_dim
    layer = 2 * shape.hidden_size * width + 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.layers * layer + shape.hidden_size * shape.vocab_size
    keys = 2 * shape.layers * shape.key_value_heads * shape.head_dim * (prompt + NEW_TOKENS / 2)
    step = FLOAT_BYTES * (weights + at_once * keys) / read
    return at_once * prefill_flops(shape, prompt) / flops + (NEW_TOKENS - 1) * step


async def measure(path: Path, rounds: int, cancelled: int) -> dict[str, Any]:
    """All of it, engines and budgets in turn."""
    heard = Heard()
    flops, read = 1e12 * report.matmul_peak("cpu", torch.float32), read_rate()  # before vLLM is there to spin
    turns: dict[tuple[str, str, int], list[Turn]] = {}
    async with running(path, "transformers", heard) as plain, running(path, "vllm", heard) as vllm:
        models = dict(zip(ENGINES, (plain, vllm), strict=True))
        asked = {word: jobs(plain, kept) for word, kept in KEPT.items()}
        cache = vllm.engine._engine.vllm_config.cache_config  # type: ignore[attr-defined]
        with report.progress("questions", (rounds + 1) * len(AT_ONCE) * len(KEPT) * len(ENGINES)) as step:
            # the first round is a warm-up, and small
            for number in range(-1, rounds):
                order = list(product(ENGINES, KEPT))
                for at_once in AT_ONCE:
                    for engine, word in order if number % 2 == 0 else reversed(order):
                        await asyncio.sleep(IDLE_S if engine == "transformers" else 0)
                        few = asked[word][: at_once if number >= 0 else 1]
                        found = await turn(models[engine], few, f"{number} {at_once} {word}", heard)
                        if number >= 0:
                            turns.setdefault((engine, word, at_once), []).append(found)
                        step()
        heard.shares.clear()
        block = 1 / (cache.num_gpu_blocks - 1)  # one is vLLM's own
        left = await cancellations(vllm, asked["all"], cancelled, block, heard)
        cases = []
        for (engine, word, at_once), found in turns.items():
            prompt = len(asked[word][0].prompt.embeddings)
            seconds = [each.seconds for each in found]
            least = least_seconds(plain.shape, prompt, at_once, flops, read)
            held = [each.blocks / block * cache.block_size for each in found]
            lengths = [len(each.prompt.embeddings) + NEW_TOKENS for each in asked[word][:at_once]]
            cases.append(
                {
                    "engine": engine,
                    "kept": word,
                    "prompt_tokens": prompt,
                    "at_once": at_once,
                    "tokens_per_second": report.spread([at_once * NEW_TOKENS / each for each in seconds]),
                    "seconds": report.spread(seconds),
                    "time_to_first_token_ms": report.spread([1000 * t for each in found for t in each.first]),
                    # transformers keeps what an answer has until it ends; vLLM tells of whole blocks
                    "kv_tokens_at_peak": sum(lengths) if engine == "transformers" else round(max(held)),
                    "least_seconds": least,
                    "share_of_limit": least / statistics.median(seconds),
                }
            )
    return {
        "cases": cases,
        "ratios": ratios_of(turns),
        "answers": compare(turns),
        "cancelled": left,
        "block_tokens": cache.block_size,
        "matmul_peak_tflops": flops / 1e12,
        "read_gb_per_second": read / 1e9,
    }


def compare(turns: dict[tuple[str, str, int], list[Turn]]) -> dict[str, int]:
    """How many answers there were, and how many of them are those that transformers first gave."""
    alike = total = 0
    for (_, word, at_once), found in turns.items():
        expected = turns["transformers", word, max(AT_ONCE)][0].tokens
        for each in found:
            total += at_once
            alike += sum(tokens == expected[place] for place, tokens in enumerate(each.tokens))
    return {"compared": total, "alike": alike}


def ratios_of(turns: dict[tuple[str, str, int], list[Turn]]) -> list[dict[str, Any]]:
    """Throughput of one over another, round by round."""

    def ratio(first: tuple[str, str, int], second: tuple[str, str, int]) -> dict[str, float]:
        # seconds: the less, the more tokens a second
        return report.ratios(
            [each.seconds for each in turns[second]], [each.seconds for each in turns[first]]
        )

    rows = []
    for at_once in AT_ONCE:
        for word in KEPT:
            found = ratio(("vllm", word, at_once), ("transformers", word, at_once))
            rows.append({"what": f"vllm / transformers, {word}", "at_once": at_once, **found})
        for engine in ENGINES:
            found = ratio((engine, "a third", at_once), (engine, "all", at_once))
            rows.append({"what": f"a third / all, {engine}", "at_once": at_once, **found})
    return rows


def show(results: dict[str, Any]) -> None:
    """The tables."""
    rows = [
        (
            f"{each['engine']}, {each['kept']}",
            each["at_once"],
            each["tokens_per_second"]["median"],
            each["time_to_first_token_ms"]["median"],
            each["kv_tokens_at_peak"],
            each["share_of_limit"],
        )
        for each in results["cases"]
    ]
    report.table(
        "32 new tokens each", ("", "at once", "tokens/s", "first token, ms", "KV tokens", "of limit"), rows
    )
    rows = [(each["what"], each["at_once"], each["median"]) for each in results["ratios"]]
    report.table("tokens a second", ("", "at once", "×"), rows)
    print(f"answers alike: {results['answers']}; cancelled: {results['cancelled']}")


def draw(results: dict[str, Any]) -> Path | None:
    """The plot."""

    def lines(
        value: Callable[[dict[str, Any]], float], *engines: str
    ) -> dict[str, list[tuple[float, float]]]:
        return {
            f"{engine}, {word}": [
                (each["at_once"], value(each))
                for each in results["cases"]
                if (each["engine"], each["kept"]) == (engine, word)
            ]
            for engine in engines
            for word in KEPT
        }

    common = {"x": "questions at a time", "log_x": True, "ticks": AT_ONCE}
    return plots.plot(
        NAME,
        [
            plots.Panel(
                **common,
                y="tokens a second",
                lines=lines(lambda each: each["tokens_per_second"]["median"], *ENGINES),
            ),
            plots.Panel(
                **common,
                y="time to first token, s",
                lines=lines(lambda each: each["time_to_first_token_ms"]["median"] / 1000, *ENGINES),
            ),
            plots.Panel(
                **common,
                y="keys and values held, tokens",
                lines=lines(lambda each: each["kv_tokens_at_peak"], *ENGINES),
            ),
        ],
    )


def main() -> None:
    """Measures, prints and writes; or draws."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cancelled", type=int, default=24)
    parser.add_argument("--draw", action="store_true", help="draw what was measured before")
    options = parser.parse_args()
    if options.draw:
        print(draw(json.loads((report.RESULTS / f"{NAME}.json").read_text("utf-8"))["results"]))
        return
    with checkpoints.temporary() as folder:
        path = checkpoints.write_llava(folder / "model", config())
        (path / "generation_config.json").write_text('{"pad_token_id": 0}', "utf-8")
        results = asyncio.run(measure(path, options.rounds, options.cancelled))
    import vllm

    settings = {
        "vllm": vllm.__version__,
        "weights": "random",
        "dtype": "float32",
        "new_tokens": NEW_TOKENS,
        "visual_tokens": KEPT,
        "rounds": options.rounds,
        "cancelled": options.cancelled,
        "vllm_args": "--enforce-eager",
    }
    show(results)
    answers, cancelled = results["answers"], results["cancelled"]
    targets = [
        report.target("share of answers alike", answers["alike"] / answers["compared"], 1.0, least=True),
        report.target("blocks of a cancelled answer are free after, ms", cancelled["ms"]["median"], 100),
    ]
    report.print_targets(targets)
    print(report.write(NAME, CLAIM, settings, results, targets=targets))
    draw(results)


if __name__ == "__main__":
    main()
