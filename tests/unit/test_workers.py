"""Claims about threads for long work: tenants take turns, and who has left is worked for no longer."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch

from hiprune import auth, quotas
from hiprune.auth import Caller, Tenant
from hiprune.errors import Exhausted
from hiprune.quotas import Charge
from hiprune.v1 import encoder_service_pb2, pruner_service_pb2, tensor_pb2
from hiprune.workers import Workers
from services.pruner import policy, service
from services.pruner.service import PrunerServicer
from services.pruner.settings import Settings


def on_behalf(tenant: str, work) -> asyncio.Task:
    context = contextvars.copy_context()
    context.run(auth.enter, Caller(Tenant(tenant)))
    return asyncio.create_task(work, context=context)


async def test_one_tenants_flood_leaves_another_its_turn():
    workers = Workers(1, "test", waiting_for="to be tested", max_waiting=100)
    gate, order = threading.Event(), []

    def work(name: str) -> None:
        gate.wait()
        order.append(name)

    tasks = [on_behalf("flood", workers.run(lambda: work("flood"), 5)) for _ in range(10)]
    await asyncio.sleep(0)
    tasks += [on_behalf("other", workers.run(lambda: work("other"))) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert order[:4] == ["flood", "other", "other", "other"]
    workers.close()


async def test_so_much_waits_and_what_is_refused_says_so():
    workers = Workers(1, "test", waiting_for="to be tested", max_waiting=2)
    gate = threading.Event()
    tasks = [asyncio.create_task(workers.run(gate.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    assert workers.waiting == 2
    with pytest.raises(Exhausted, match="2 requests wait to be tested, at a cost of at most 2") as caught:
        await workers.run(gate.wait)
    assert (caught.value.reason, caught.value.retry_after_s) == ("OVERLOADED", 1)
    gate.set()
    await asyncio.gather(*tasks)
    workers.close()


async def test_a_turn_lasts_as_long_as_its_work_and_not_as_its_client():
    workers = Workers(1, "test", waiting_for="to be tested", max_waiting=10)
    begun, gate = threading.Event(), threading.Event()

    def work(is_wanted) -> None:
        begun.set()
        gate.wait(20)
        seen.append(is_wanted())

    seen: list[bool] = []
    leaves = asyncio.create_task(workers.run_wanted(work))
    await asyncio.to_thread(begun.wait)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    stays = asyncio.create_task(workers.run(lambda: "done"))
    await asyncio.sleep(0.01)
    assert workers.waiting == 1  # and is seen to wait, while the thread is at work for nobody
    gate.set()
    assert await asyncio.wait_for(stays, 10) == "done"
    assert seen == [False]
    workers.close()


class EndlessText:
    """A text encoder that reads statements for as long as somebody wants it to; a chunk a character."""

    name, digest = "endless", "0"

    def __init__(self) -> None:
        self.read: list[int] = []
        self.begun = threading.Event()

    def split(self, question: str) -> list[list[int]]:
        return [[question.count("?")]] * len(question)

    def embed(self, chunks, is_wanted=lambda: True) -> torch.Tensor | None:
        self.read.append(len(chunks))
        self.begun.set()
        while chunks[0] == [0]:
            if not is_wanted():
                return None
        return torch.ones(3)


async def test_a_question_whose_client_has_left_keeps_nobody_waiting():
    servicer = PrunerServicer(Settings())
    servicer._text = text = EndlessText()
    leaves = asyncio.create_task(servicer._text_vector(text.split("long")))
    await asyncio.to_thread(text.begun.wait)
    stays = asyncio.create_task(servicer._text_vector(text.split("?")))
    leaves.cancel()
    assert (await asyncio.wait_for(stays, 10)).shape == (3,)
    assert text.read == [4, 1]


async def test_tenants_questions_take_turns_by_their_length():
    servicer = PrunerServicer(Settings())
    servicer._text = text = EndlessText()
    leaves = on_behalf("first", servicer._text_vector(text.split("long")))
    await asyncio.to_thread(text.begun.wait)
    asked = [("long", "???")] * 2 + [("short", "?")] * 6
    stay = [on_behalf(owner, servicer._text_vector(text.split(question))) for owner, question in asked]
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait_for(asyncio.gather(*stay), 10)
    assert text.read == [4, 3, 1, 1, 1, 3, 1, 1, 1]


def divprune(side: int) -> tuple[list[encoder_service_pb2.View], policy.Policy]:
    """Views of side × side tokens of LLaVA's width, of which nothing but the size is there, and a policy."""
    features = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[side**2, 1024])
    view = encoder_service_pb2.View(grid_height=side, grid_width=side, features=features)
    message = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_DIVPRUNE, keep_count=9)
    return [view], policy.resolve_layers(message, object_layer=1, deep_layer=2)


async def test_tenants_comparisons_take_turns_by_their_work_and_so_much_of_it_waits():
    servicer, gate, order = PrunerServicer(Settings()), threading.Event(), []

    def select(name: str, side: int) -> asyncio.Task:
        def work(is_wanted) -> None:
            gate.wait()
            order.append(name)

        return on_behalf(name, servicer._select(work, *divprune(side)))

    tasks = [select("first", 64)]
    await asyncio.sleep(0)
    tasks += [select("large", 64) for _ in range(6)] + [select("small", 32) for _ in range(8)]
    await asyncio.sleep(0)
    try:
        with pytest.raises(Exhausted, match="14 requests wait for tokens to be compared") as caught:
            await asyncio.wait_for(select("large", 64), 5)
    finally:
        gate.set()
    assert caught.value.reason == "OVERLOADED"
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert order == ["first", "large"] + ["small"] * 8 + ["large"] * 5


async def test_a_comparison_is_paid_for_before_it_begins():
    class Empty(Charge):
        async def reserve(self, kept: int, before: int) -> None:
            raise Exhausted(f"{kept} of {before}", reason="QUOTA")

    begun = []

    async def select() -> None:
        quotas.enter(Empty())
        await PrunerServicer(Settings())._select(begun.append, *divprune(4))

    with pytest.raises(Exhausted, match="9 of 16"):
        await asyncio.create_task(select())
    assert not begun


async def test_the_event_loop_checks_prunes_and_serialises_no_tokens(monkeypatch):
    threads: dict[str, int] = {}

    def watched(name: str, work):
        def call(*args, **kwargs):
            threads[name] = threading.get_ident()
            return work(*args, **kwargs)

        return call

    for name in ("check_views", "_policy_of_tokens", "_prune_tokens"):
        monkeypatch.setattr(service, name, watched(name, getattr(service, name)))
    answers = pruner_service_pb2.PruneTokensResponse
    monkeypatch.setattr(pruner_service_pb2, "PruneTokensResponse", watched("answer", answers))
    features = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[4, 3], data=bytes(48))
    view = encoder_service_pb2.View(grid_height=2, grid_width=2, features=features)
    policy = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_STRIDED, keep_count=2)
    request = pruner_service_pb2.PruneTokensRequest(views=[view], policy=policy)
    answer = await PrunerServicer(Settings()).PruneTokens(request, None)
    assert isinstance(answer, bytes)
    assert list(answers.FromString(answer).views[0].features.shape) == [2, 3]
    assert set(threads) == {"check_views", "_policy_of_tokens", "_prune_tokens", "answer"}
    assert threading.get_ident() not in threads.values()
