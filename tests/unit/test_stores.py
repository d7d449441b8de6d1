"""Stores: bounded in bytes and time; a Redis in any trouble is a miss after a short wait, never an error."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
import traceback

import pytest
from redis import asyncio as redis

from hiprune.config import ConfigError
from services.pruner.process import open_store
from services.pruner.redis_store import RedisStore
from services.pruner.settings import Settings
from services.pruner.stores import MemoryStore, NoStore

OWNER = b"hiprune:v1:{owner}"
BUDGET_S = 0.2
SLACK_S = 0.3
"""What a busy machine may add to a budget."""


@pytest.fixture
async def connect():
    """Opens Redis stores and closes them after the test."""
    stores = []

    def open_store(url: str, *, ttl_s: int = 60, timeout_s: float = BUDGET_S) -> RedisStore:
        stores.append(RedisStore(url, ttl_s=ttl_s, timeout_s=timeout_s))
        return stores[-1]

    yield open_store
    for store in stores:
        await store.close()


@pytest.fixture
def quick_breaker(monkeypatch):
    monkeypatch.setattr(RedisStore, "OPEN_S", 0.5)


async def timed(operation) -> tuple[bytes | None, float]:
    begun = time.monotonic()
    return await operation, time.monotonic() - begun


async def open_breaker(store: RedisStore) -> None:
    for _ in range(RedisStore.FAILURES_TO_OPEN):
        assert await store.get(b"k") is None


# --- memory ---------------------------------------------------------------------------------------


async def test_memory_keeps_its_bytes_and_drops_the_least_recently_used():
    store = MemoryStore(max_bytes=100, ttl_s=60)
    for name in (b"a", b"b", b"c"):
        await store.put(name, name * 30, owner=OWNER)
    assert await store.get(b"a") == b"a" * 30  # now b is the oldest
    await store.put(b"d", b"d" * 30, owner=OWNER)
    assert [await store.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [
        True,
        False,
        True,
        True,
    ]
    await store.put(b"e", b"e" * 95, owner=OWNER)
    assert [await store.get(name) is not None for name in (b"a", b"c", b"d", b"e")] == [
        False,
        False,
        False,
        True,
    ]


async def test_memory_leaves_out_what_is_larger_than_all_of_it_and_keeps_the_rest():
    store = MemoryStore(max_bytes=100, ttl_s=60)
    await store.put(b"a", b"a" * 100, owner=OWNER)
    await store.put(b"b", b"b" * 101, owner=OWNER)
    assert await store.get(b"a") == b"a" * 100
    assert await store.get(b"b") is None


async def test_memory_counts_a_replaced_value_once():
    store = MemoryStore(max_bytes=100, ttl_s=60)
    for _ in range(5):
        await store.put(b"a", b"a" * 40, owner=OWNER)
    await store.put(b"b", b"b" * 60, owner=OWNER)
    assert await store.get(b"a") == b"a" * 40
    assert await store.get(b"b") == b"b" * 60


async def test_memory_forgets_in_time_and_when_told():
    now = 100.0
    store = MemoryStore(max_bytes=100, ttl_s=10, clock=lambda: now)
    await store.put(b"a", b"1", owner=OWNER)
    now = 109.0
    assert await store.get(b"a") == b"1"
    now = 110.0
    assert await store.get(b"a") is None
    await store.put(b"a", b"2", owner=OWNER)
    await store.delete(b"a")
    await store.delete(b"never there")
    await store.put(b"a", b"new", owner=OWNER)
    assert not await store.delete(b"a", b"old")
    assert await store.delete(b"a", b"new")
    assert await store.get(b"a") is None


async def test_memory_drops_what_has_expired_before_what_is_alive():
    now = 0.0
    store = MemoryStore(max_bytes=100, ttl_s=10, clock=lambda: now)
    await store.put(b"old", bytes(50), owner=OWNER)
    now = 5.0
    await store.put(b"young", bytes(50), owner=OWNER)
    await store.get(b"old")  # used last, and yet gone first
    now = 11.0
    await store.put(b"new", bytes(50), owner=OWNER)
    assert await store.get(b"young") == bytes(50)
    assert store.held(OWNER) == 100


async def test_memory_bounds_each_owner_at_its_own_cost():
    store = MemoryStore(max_bytes=100, ttl_s=60, share_bytes=50)
    await store.put(b"hers", bytes(30), owner=b"alice")
    for number in range(10):
        assert await store.put(b"his %d" % number, bytes(20), owner=b"bob")
        await store.get(b"his 0")
    assert store.held(b"bob") == 40
    kept = [number for number in range(10) if await store.get(b"his %d" % number) is not None]
    assert kept == [0, 9]  # the one that is used, and the last
    assert await store.get(b"hers") == bytes(30)
    assert not await store.put(b"larger than a share", bytes(51), owner=b"bob")
    assert store.held(b"bob") == 40


async def test_memory_of_many_owners_stays_within_all_of_it():
    store = MemoryStore(max_bytes=100, ttl_s=60, share_bytes=50)
    for owner in (b"a", b"b", b"c", b"d"):
        await store.put(owner, bytes(40), owner=owner)
    assert [store.held(owner) for owner in (b"a", b"b", b"c", b"d")] == [0, 0, 40, 40]
    await store.put(b"c", bytes(10), owner=b"d")  # a key that changes hands is counted once
    assert [store.held(owner) for owner in (b"c", b"d")] == [0, 50]


async def test_a_memory_of_no_bytes_and_no_store_keep_nothing():
    for store in (MemoryStore(max_bytes=0, ttl_s=60), NoStore()):
        await store.put(b"a", b"1", owner=OWNER)
        assert await store.get(b"a") is None
        await store.delete(b"a")
        await store.close()


# --- a Redis that is well -------------------------------------------------------------------------


async def test_redis_keeps_any_bytes_for_its_time_and_forgets_when_told(connect, redis_server):
    store = connect(redis_server, ttl_s=30)
    value = bytes(range(256)) * 5000  # 1.3 MB, a LLaVA-1.5 image
    await store.put(b"well:\x00\xff", value, owner=OWNER)
    assert await store.get(b"well:\x00\xff") == value
    async with redis.Redis.from_url(redis_server) as plain:
        assert 0 < await plain.ttl(b"well:\x00\xff") <= 30
    await store.delete(b"well:\x00\xff")
    assert await store.get(b"well:\x00\xff") is None


async def test_a_rush_of_requests_is_answered_over_a_few_connections(connect, redis_server):
    store = connect(redis_server, timeout_s=5)
    await store.put(b"rush", b"1", owner=OWNER)
    found = await asyncio.gather(*(store.get(b"rush") for _ in range(300)))
    assert found == [b"1"] * 300
    async with redis.Redis.from_url(redis_server) as plain:
        assert len(await plain.client_list()) <= RedisStore.MAX_CONNECTIONS + 5


# --- a Redis in trouble ---------------------------------------------------------------------------


async def test_a_paused_redis_is_a_miss_within_the_budget_then_at_once_then_comes_back(
    connect, start_redis, caplog, quick_breaker
):
    url, process = start_redis()
    store = connect(url)
    await store.put(b"k", b"v", owner=OWNER)
    assert await store.get(b"k") == b"v"
    process.send_signal(signal.SIGSTOP)
    for _ in range(RedisStore.FAILURES_TO_OPEN):
        value, took = await timed(store.get(b"k"))
        assert value is None
        assert BUDGET_S * 0.9 < took < BUDGET_S + SLACK_S
    for operation in (store.get(b"k"), store.put(b"k", b"w", owner=OWNER), store.delete(b"k")):
        value, took = await timed(operation)
        assert not value
        assert took < BUDGET_S / 4  # the breaker is open: nobody waits
    process.send_signal(signal.SIGCONT)
    assert await store.get(b"k") is None  # still open
    await asyncio.sleep(RedisStore.OPEN_S + 0.05)
    assert await store.get(b"k") == b"v"
    assert await store.get(b"k") == b"v"
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "Redis fails",
        "Redis answers again",
    ]


async def test_a_process_that_was_held_up_itself_takes_a_redis_that_answers_for_well(connect, redis_server):
    store = connect(redis_server, timeout_s=0.05)
    assert await store.put(b"held up", b"v", owner=OWNER)
    for _ in range(4):
        await store._redis.connection_pool.disconnect()  # so that an answer takes several turns of the loop
        asyncio.get_running_loop().call_soon(time.sleep, 0.2)
        assert await store.get(b"held up") == b"v"


async def test_one_probe_alone_waits_for_a_redis_that_is_still_away(connect, start_redis, quick_breaker):
    url, process = start_redis()
    store = connect(url)
    process.send_signal(signal.SIGSTOP)
    await open_breaker(store)
    await asyncio.sleep(RedisStore.OPEN_S + 0.05)
    times = [took for _, took in await asyncio.gather(*(timed(store.get(b"k")) for _ in range(20)))]
    assert sum(took > BUDGET_S / 2 for took in times) == 1


async def test_an_answer_that_comes_too_late_reaches_nobody_else(connect, start_redis, quick_breaker):
    """A connection that was given up holds the answer to another question."""
    url, process = start_redis()
    store = connect(url)
    for number in range(8):
        await store.put(b"%d" % number, b"value %d" % number, owner=OWNER)
    process.send_signal(signal.SIGSTOP)
    waiting = [asyncio.create_task(store.get(b"%d" % number)) for number in range(4)]
    await asyncio.sleep(BUDGET_S / 4)
    waiting[0].cancel()  # its client left
    assert (await asyncio.gather(*waiting, return_exceptions=True))[1:] == [None] * 3
    process.send_signal(signal.SIGCONT)
    await asyncio.sleep(RedisStore.OPEN_S + 0.05)
    assert await store.get(b"7") == b"value 7"  # the probe
    found = await asyncio.gather(*(store.get(b"%d" % number) for number in reversed(range(8))))
    assert found == [b"value %d" % number for number in reversed(range(8))]


async def test_a_killed_redis_is_a_miss_at_once_and_a_new_one_is_found(connect, start_redis, quick_breaker):
    url, process = start_redis()
    store = connect(url)
    await store.put(b"k", b"v", owner=OWNER)
    process.kill()
    process.wait()
    for _ in range(5):
        value, took = await timed(store.get(b"k"))
        assert value is None
        assert took < BUDGET_S + SLACK_S
    await store.put(b"k", b"v", owner=OWNER)
    await store.delete(b"k")
    os.unlink(url.removeprefix("unix://"))
    os.symlink(start_redis()[0].removeprefix("unix://"), url.removeprefix("unix://"))
    await asyncio.sleep(RedisStore.OPEN_S + 0.05)
    await store.put(b"k", b"w", owner=OWNER)
    assert await store.get(b"k") == b"w"


async def test_a_full_redis_stores_nothing_and_still_answers(connect, start_redis, caplog):
    url, _ = start_redis("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    store = connect(url)
    await store.put(b"early", b"bird", owner=OWNER)
    for number in range(10):
        await store.put(b"k%d" % number, bytes(500_000), owner=OWNER)
    found = [await store.get(b"k%d" % number) is not None for number in range(10)]
    assert found[0]
    assert not found[9]
    await asyncio.gather(*(store.put(b"more", bytes(1000), owner=OWNER) for _ in range(10)))
    assert await store.get(b"early") == b"bird"  # many failed writes in a row close no door to reads
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    await store.delete(b"k0")
    await store.put(b"late", b"bird", owner=OWNER)
    assert await store.get(b"late") == b"bird"


async def test_a_redis_that_asks_for_a_password_is_a_miss(connect, start_redis):
    url, _ = start_redis("--requirepass", "sesame")
    store = connect(url)
    await store.put(b"k", b"v", owner=OWNER)
    assert await store.get(b"k") is None
    right = connect(url.replace("unix://", "unix://:sesame@"))
    await right.put(b"k", b"v", owner=OWNER)
    assert await right.get(b"k") == b"v"


async def test_nobody_at_the_address_is_a_miss(connect, tmp_path):
    for url in (f"unix://{tmp_path}/nobody.sock", "redis://127.0.0.1:1/0"):
        store = connect(url)
        await store.put(b"k", b"v", owner=OWNER)
        value, took = await timed(store.get(b"k"))
        assert value is None
        assert took < BUDGET_S + SLACK_S


@pytest.mark.parametrize(
    "url", ["", "http://127.0.0.1", "redis://host:port", "redis://h?socket_timeout=x", "redis://h?what=1"]
)
def test_a_url_that_is_none_is_refused_at_once_and_not_in_a_request(url):
    with pytest.raises((ValueError, TypeError)):
        RedisStore(url, ttl_s=60, timeout_s=BUDGET_S)


def test_the_wrong_url_is_a_wrong_setting_and_its_password_stays_secret():
    url = "redis://:sesa:me#1@host:6379/0"
    settings = Settings(cache="redis", cache_secret="x" * 16, redis_url=url)
    with pytest.raises(ConfigError, match="--redis-url") as caught:
        open_store(settings)
    assert "sesa" not in "".join(traceback.format_exception(caught.value))


def test_the_store_is_the_one_that_the_settings_name(redis_server):
    assert open_store(Settings(cache="off")).name == "off"
    assert open_store(Settings(cache="memory")).name == "memory"
    settings = Settings(cache="redis", cache_secret="x" * 16, redis_url=redis_server)
    assert open_store(settings).name == "redis"


async def test_a_store_closes_while_its_redis_is_away(start_redis):
    for how in (signal.SIGSTOP, signal.SIGKILL):
        url, process = start_redis()
        store = RedisStore(url, ttl_s=60, timeout_s=BUDGET_S)
        await store.put(b"k", b"v", owner=OWNER)
        process.send_signal(how)
        assert (await timed(store.close()))[1] < BUDGET_S + SLACK_S
