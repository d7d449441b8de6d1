"""Examines a model: every variant of pruning, asked the same questions about the same held-out scenes.

The encoder and the pruner are the service's own processes; the language model runs here, many questions at a
time (`reader`). Scenes are shared out over processes of one thread each: so nothing depends on how many
there are, and the same plan gives the same answers. Knows no statistics; see `summary`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hiprune.checkpoints import open_checkpoint
from models.shapes.exam import Sheet, sheet, token_owners
from models.shapes.prunings import Kept, Prunings, Services, services
from models.shapes.reader import Answer, Look, Reader
from models.shapes.variants import Variant, ablations, kept, methods

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """What is examined. The same plan gives the same answers."""

    model: str
    scenes: int
    ablation_scenes: int
    """The first so many of the scenes are asked of the ablations too."""
    each: int = 2
    """Questions of every type about a scene, at most."""
    seed: int = 0

    def variants(self) -> list[Variant]:
        """All of them, methods first."""
        return [*methods(), *(ablations(open_checkpoint(self.model).facts) if self.ablation_scenes else ())]


@dataclass(frozen=True)
class Found:
    """What one variant came to on one scene; lists are by question."""

    said: list[str]
    tokens: float
    """Kept tokens, mean over questions."""
    foreground: float
    """Share of the kept tokens that show a thing, mean over questions."""
    covered: list[bool]
    """Whether each thing that the question speaks of is shown by a kept token."""


@dataclass(frozen=True)
class Record:
    """One scene."""

    number: int
    types: list[str]
    truths: list[str]
    found: list[Found]
    """By variant, in the plan's order; those of the ablations are left out where they were not asked."""
    grid: tuple[int, int]
    owners: npt.NDArray[np.int64]  # (N,)
    scores: Mapping[int, Scores]  # layer → (N,)
    cls: Mapping[int, Scores]  # likewise, from CLS alone; empty where ablations were not asked


def run(plan: Plan, workers: int = 0, step: Callable[[], None] = lambda: None) -> list[Record]:
    """Examines; one record a scene, by number. `step` is called after each; `workers` 0: a process a core.

    Starts encoder and pruner, and ends them. Raises StackError, CheckpointError; grpc.aio.AioRpcError where
    the service refuses a variant.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with services(plan.model) as running:
        return shared_out(plan, running, min(workers or cores, plan.scenes), step)


def shared_out(
    plan: Plan, running: Services, workers: int, step: Callable[[], None] = lambda: None
) -> list[Record]:
    """As `run`, through an encoder and a pruner that run already."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(plan, running)) as pool:
        waiting = [pool.submit(_examine, number) for number in range(plan.scenes)]
        try:
            records = []
            for done in as_completed(waiting):
                records.append(done.result())
                step()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(records, key=lambda record: record.number)


class Examiner:
    """One process's share of the work."""

    def __init__(self, plan: Plan, running: Services) -> None:
        checkpoint = open_checkpoint(plan.model)
        self._plan = plan
        self._prunings = Prunings(running, checkpoint.facts.deep_layer)
        self._reader = Reader(checkpoint)
        self._methods = methods()
        self._ablations = ablations(checkpoint.facts) if plan.ablation_scenes else []

    async def examine(self, number: int) -> Record:
        """Scene `number`, under every variant."""
        asked = sheet(self._plan.seed, number, self._plan.each)
        encoded = await self._prunings.encoded(asked.image)
        variants = list(self._methods)
        ablated = number < self._plan.ablation_scenes
        if ablated:
            variants += self._ablations
        owners = token_owners(asked.owners, encoded.grid)
        questions = [question.text for question in asked.questions]
        answers = _Answers(self._reader, encoded.grid)
        found = []
        for variant in variants:
            left = await kept(variant, self._prunings, asked.image, encoded, questions)
            found.append(_found(answers.of(left, questions), left, asked, owners))
        return Record(
            number=number,
            types=[question.type for question in asked.questions],
            truths=[question.answer for question in asked.questions],
            found=found,
            grid=encoded.grid,
            owners=owners,
            scores=encoded.scores,
            cls=encoded.cls if ablated else {},
        )


class _Answers:
    """The reader's answers about one scene, each worked out once: variants often keep the same tokens."""

    def __init__(self, reader: Reader, grid: tuple[int, int]) -> None:
        self._reader, self._grid = reader, grid
        self._known: dict[tuple[bytes, str], Answer] = {}

    def of(self, left: Sequence[Kept], questions: Sequence[str]) -> list[Answer]:
        """The answer to each question from what is left for it."""
        keys = [each.identity for each in left]
        open_: dict[bytes, tuple[Kept, list[str]]] = {}
        for key, each, question in zip(keys, left, questions, strict=True):
            if (key, question) not in self._known:
                open_.setdefault(key, (each, []))[1].append(question)
        looks = [Look(each.features, each.indices, self._grid, tuple(some)) for each, some in open_.values()]
        for key, look, answers in zip(open_, looks, self._reader.answer(looks) if looks else (), strict=True):
            self._known |= {
                (key, question): answer for question, answer in zip(look.questions, answers, strict=True)
            }
        return [self._known[key, question] for key, question in zip(keys, questions, strict=True)]


def _found(
    answers: Sequence[Answer], left: Sequence[Kept], asked: Sheet, owners: npt.NDArray[np.int64]
) -> Found:
    shown = [owners[each.indices.numpy()] for each in left]  # Q × (K,)
    return Found(
        said=[answer.text for answer in answers],
        tokens=float(np.mean([each.size for each in shown])),
        foreground=float(np.mean([(each > 0).mean() for each in shown])),
        covered=[
            all((each == thing + 1).any() for thing in question.about)
            for question, each in zip(asked.questions, shown, strict=True)
        ],
    )


_runner: asyncio.Runner | None = None
_examiner: Examiner | None = None
"""Of a worker process: one loop, on which its channels live."""


def _begin(plan: Plan, running: Services) -> None:
    global _runner, _examiner  # noqa: PLW0603  # what a pool's processes begin with has no other place
    # more threads are no faster beside another process, and would make sums depend on their number
    torch.set_num_threads(1)
    _runner = asyncio.Runner()

    async def begin() -> Examiner:
        return Examiner(plan, running)

    _examiner = _runner.run(begin())


def _examine(number: int) -> Record:
    assert _runner is not None
    assert _examiner is not None
    return _runner.run(_examiner.examine(number))
