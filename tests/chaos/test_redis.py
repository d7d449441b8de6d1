"""Claims about a Redis that is killed, paused, full or full of rubbish: it costs time, and no request."""

from __future__ import annotations

import asyncio
import random
import signal

import pytest
import redis

from hiprune.client import Client
from hiprune.stack import is_serving
from hiprune.v1 import pruner_service_pb2 as pb
from tests.chaos.load import POLICIES, Ask, until
from tests.stacks import picture

pytestmark = pytest.mark.extra

FAILS = "Redis fails"
ANSWERS = "Redis answers again"
COUNTS_ALONE = "limits are counted in this process alone"
COUNTS_IN_REDIS = "limits are counted in Redis again"


async def cache_of(client: Client, ask: Ask) -> int:
    """Where an answer's tokens came from."""
    return (await ask.of(client)).report.media[0].cache


async def hits_again(house) -> None:
    """Returns when what was asked is found in the cache, and limits are counted in Redis."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + 20
    async with house.client() as client:
        while True:
            found = await cache_of(client, house.judge.asks[0])
            said = {text: house.logged("llm", text) for text in (COUNTS_IN_REDIS, COUNTS_ALONE)}
            said |= {text: house.logged("pruner", text) for text in (ANSWERS, FAILS)}
            if (
                found == pb.CACHE_STATUS_PRUNED_HIT
                and said[COUNTS_IN_REDIS] == said[COUNTS_ALONE]
                and said[ANSWERS] == said[FAILS]
            ):
                break
            assert loop.time() < end_s, (found, said)
            await asyncio.sleep(0.05)
    assert is_serving(house.stack.address)
    assert is_serving(house.stack.pruner_address)


async def test_redis_killed_and_started_again_fails_no_request(house, make_load):
    async with make_load() as load:
        await load.right(30)
        house.stack.end("redis", signal.SIGKILL)
        await load.right(30)
        await until(lambda: house.logged("pruner", FAILS) and house.logged("llm", COUNTS_ALONE))
        await load.right(30)
        house.stack.start_redis()
        await load.right(30)
        await hits_again(house)
    assert load.tally.refused == 0


async def test_redis_paused_and_woken_fails_no_request(house, make_load):
    failed = house.logged("pruner", FAILS)
    process = house.stack.processes["redis"]
    async with make_load() as load:
        await load.right(30)
        process.send_signal(signal.SIGSTOP)
        try:
            await load.right(30)
            await until(lambda: house.logged("pruner", FAILS) > failed)
            await load.right(120)  # seconds: the breaker and the limits have tried again meanwhile
        finally:
            process.send_signal(signal.SIGCONT)
        await load.right(30)
        await hits_again(house)
    assert load.tally.refused == 0


async def test_a_full_redis_fails_no_request_and_stores_again_when_there_is_room(house, make_load):
    refused = house.logged("pruner", "Redis refuses to store")
    with house.redis() as redis_client:
        async with make_load() as load:
            await load.right(30)
            before = redis_client.config_get("maxmemory*")
            redis_client.config_set("maxmemory-policy", "noeviction")
            redis_client.config_set("maxmemory", "1")
            try:
                await load.right(30)
                assert house.logged("pruner", "Redis refuses to store") > refused or refused
                async with house.client() as client:  # what is there is still found
                    assert await cache_of(client, house.judge.asks[0]) == pb.CACHE_STATUS_PRUNED_HIT
                await load.right(30)
            finally:
                redis_client.config_set("maxmemory", before["maxmemory"])
                redis_client.config_set("maxmemory-policy", before["maxmemory-policy"])
            await load.right(30)
            await hits_again(house)
            await stores_again(house)
    assert load.tally.refused == 0


async def stores_again(house) -> None:
    """Returns when a new picture is found in the cache the second time."""
    new = Ask(picture("scene15.png") + b"\0", "count the shapes .", POLICIES[0], "")

    async with asyncio.timeout(20), house.client() as client:
        while await cache_of(client, new) != pb.CACHE_STATUS_PRUNED_HIT:
            pass


def corrupt(server: redis.Redis, draw: random.Random) -> int:
    """Writes rubbish over every key that services have in Redis; of how many kinds of keys there were."""
    keys = [key for key in server.scan_iter(count=1000) if b"hiprune" in key]
    strings = [key for key in keys if server.type(key) == b"string"]
    values = {key: server.get(key) or b"" for key in strings}
    for key in keys:
        value = values.get(key)
        how = draw.randrange(7)
        if value is None or how == 0:  # another type altogether
            server.delete(key)
            server.set(key, b"rubbish") if value is None else server.rpush(key, b"rubbish")
        elif how == 1:
            server.set(key, value[: draw.randrange(len(value) + 1)])
        elif how == 2 and value:
            place = draw.randrange(len(value))
            server.setrange(key, place, bytes([value[place] ^ 1 << draw.randrange(8)]))
        elif how == 3:
            server.set(key, b"")
        elif how == 4:
            server.set(key, draw.randbytes(len(value) + draw.randrange(100)))
        elif how == 5:
            server.append(key, b"\0")
        else:  # another key's, true in its place
            server.set(key, values[draw.choice(strings)])
    return len(keys)


async def test_no_rubbish_in_redis_makes_a_wrong_answer(house, make_load):
    draw = random.Random(6)
    written = 0
    with house.redis() as server:
        async with make_load() as load:
            await load.right(30)
            for _ in range(6):
                written += corrupt(server, draw)
                await load.right(40)
            await load.right(120)
            await hits_again(house)
    assert written > 500
    assert load.tally.refused == 0
    assert house.logged("pruner", "a damaged cache value was deleted") > 20
