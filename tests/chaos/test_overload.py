"""Claims about more clients than there is room for, and clients that leave: refused, and forgotten."""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from hiprune.client import question_message
from hiprune.errors import Exhausted
from hiprune.stack import SERVICES
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, llm_service_pb2
from hiprune.v1.media_pb2 import Media
from tests.chaos.conftest import QUEUE, SLOTS
from tests.chaos.load import DEADLINE_S, Tally, judged, renewed, until
from tests.fuzz.memory import memory_of

pytestmark = pytest.mark.extra

CROWD = 5 * (SLOTS + QUEUE)
MOST_BYTES = 150 * 2**20
"""What a service may take above what it had, at its highest, while it is overrun."""


async def test_a_crowd_is_refused_in_time_told_when_to_come_back_and_costs_bounded_memory(house, make_load):
    with ExitStack() as watched:
        grown = {name: watched.enter_context(memory_of(house.stack.processes[name].pid)) for name in SERVICES}
        async with make_load(tenant="crowd", clients=CROWD, fresh_every=2) as load:
            await load.ended(1500, within_s=60)
    print({name: f"+{memory.grew / 2**20:.0f} MiB" for name, memory in grown.items()})
    assert load.tally.retryable["RESOURCE_EXHAUSTED OVERLOADED"] > 100
    assert load.tally.refused == load.tally.retryable["RESOURCE_EXHAUSTED OVERLOADED"]
    assert all(memory.grew < MOST_BYTES for memory in grown.values())
    async with make_load() as load:
        await load.right(30)
    assert load.tally.refused == 0


async def test_who_leaves_frees_a_place_at_once_in_every_queue(house, make_load):
    """The encoder stands still: nobody gets on by being served."""
    tally = Tally()

    async with house.client("crowd", timeout_s=20) as client:

        def crowd(count: int) -> list[asyncio.Task[bool]]:
            return [
                asyncio.create_task(
                    judged(house.judge, client, ask, tally, deadline_s=20 + DEADLINE_S, fresh=True)
                )
                for ask in house.judge.asks[:count]
            ]

        async def is_full() -> None:
            await until(lambda: house.encoding() == SLOTS)
            with pytest.raises(Exhausted):
                await house.judge.asks[0].of(client, fresh=True)

        with house.stopped("encoder"):
            left = crowd(SLOTS + QUEUE)
            await is_full()
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await until(lambda: house.encoding() == 0)
            stayed = crowd(SLOTS + QUEUE)
            await is_full()
            assert not any(task.done() for task in stayed)
        await asyncio.gather(*stayed)
    assert (tally.right, tally.ended) == (SLOTS + QUEUE, SLOTS + QUEUE), str(tally)
    async with make_load() as load:
        await load.right(30)


async def test_who_leaves_in_the_middle_of_an_answer_is_missed_by_nobody(house, make_load):
    async with make_load(clients=2) as load, house.client() as client:
        for turn, ask in enumerate(house.judge.asks[:40]):
            request = llm_service_pb2.AskImageRequest(
                messages=[question_message(ask.question, [renewed(ask.image) if turn % 2 else ask.image])],
                policy=ask.policy,
            )
            events = client.ask_stream(request)
            assert (await anext(events)).WhichOneof("event") == "report"
            await events.aclose()
        await load.right(30)
    assert load.tally.refused == 0
    async with make_load() as load:  # all but two of the tenant's places
        await load.right(30)
    assert load.tally.refused == 0


async def test_work_whose_deadline_passed_costs_the_encoder_nothing(house):
    """Twice the same crowd at the encoder; most of the one that has no time is never encoded."""

    async def cost_s(timeout_s: float) -> tuple[float, int]:
        process = Path("/proc") / str(house.stack.processes["encoder"].pid) / "stat"

        def spent_s() -> float:
            words = process.read_text("ascii").rpartition(")")[2].split()
            return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

        begun_s = spent_s()
        async with grpc.aio.insecure_channel(house.stack.encoder_address) as channel:
            stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)

            async def encode(image: bytes) -> bool:
                request = encoder_service_pb2.EncodeImageRequest(media=Media(image=image), layers=[1])
                try:
                    return bool((await stub.EncodeImage(request, timeout=timeout_s)).views)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error  # noqa: PT017
                    return False

            images = [renewed(ask.image) for ask in house.judge.asks[:50] * 2]  # a queue takes 113
            done = sum(await asyncio.gather(*map(encode, images)))
            assert await encode(renewed(images[0])) or timeout_s < 1
        return spent_s() - begun_s, done

    whole_s, whole = await cost_s(60)
    short_s, short = await cost_s(0.2)
    print(f"{whole} encoded: {whole_s:.2f} s of CPU; {short} in time, of as many: {short_s:.2f} s")
    assert short < whole / 2
    assert short_s < whole_s * 0.6
    async with house.client() as client:
        assert (await house.judge.asks[0].of(client, fresh=True)).text
