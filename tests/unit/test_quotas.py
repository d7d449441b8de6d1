"""Claims about limits: what is counted, when there is room again, and what is given back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import signal
import time

import hypothesis
import pytest
import redis.asyncio
from hypothesis import strategies as st

from hiprune import limit_stores, quotas
from hiprune.auth import Limits, Tenant
from hiprune.config import ConfigError
from hiprune.errors import Exhausted, Expired, Internal, InvalidInput, Unavailable
from hiprune.limit_stores import WINDOW_S, ProcessStore, RedisStore, Window
from hiprune.quotas import Charge, Quotas

LEASE_S = 60
fresh = map("key{}".format, itertools.count()).__next__


@pytest.fixture(params=["process", "redis"])
async def store(request, redis_server):
    made = ProcessStore() if request.param == "process" else RedisStore(redis_server)
    yield made
    await made.close()


# --- when there is room again ------------------------------------------------------------------------------


def used_at(window: Window, after_s: float) -> int:
    """What counts a while later, by the definition of a sliding window."""
    turn_s = window.current_left_s - WINDOW_S
    if after_s < turn_s:
        return math.floor(window.previous * (window.previous_left_s - after_s) / WINDOW_S) + window.current
    return math.floor(window.current * max(0.0, window.current_left_s - after_s) / WINDOW_S)


@hypothesis.settings(max_examples=300, derandomize=True)
@hypothesis.given(
    turn_ms=st.integers(1, 60_000),
    previous=st.integers(0, 3000),
    current=st.integers(0, 3000),
    limit=st.integers(1, 3000),
    cost=st.integers(1, 3000),
)
def test_the_time_until_there_is_room_is_the_true_one(turn_ms, previous, current, limit, cost):
    hypothesis.assume(cost <= limit)
    turn_s = turn_ms / 1000
    window = Window(previous, turn_s, current, turn_s + WINDOW_S)
    wait_s = window.free_in_s(limit, cost)
    assert used_at(window, wait_s + 1e-6) + cost <= limit
    if wait_s > 0.002:
        assert used_at(window, wait_s - 0.002) + cost > limit


async def test_who_waits_as_long_as_said_gets_in(store, monkeypatch):
    monkeypatch.setattr(limit_stores, "WINDOW_S", 1)
    key = fresh()
    assert await store.take(key, 10, 10) is None
    wait_s = await store.take(key, 10, 4)
    assert 0 < wait_s < 2
    await asyncio.sleep(wait_s + 0.002)
    assert await store.take(key, 10, 4) is None


# --- stores ------------------------------------------------------------------------------------------------


async def test_as_much_as_the_limit_fits_and_no_more(store):
    key = fresh()
    taken = [await store.take(key, 5, 1) for _ in range(7)]
    assert taken[:5] == [None] * 5
    assert all(0 < wait_s <= 2 * WINDOW_S for wait_s in taken[5:])
    assert await store.take(fresh(), 5, 5) is None  # another key, another count


async def test_many_at_once_get_no_more_than_one_after_the_other(store):
    key = fresh()
    taken = await asyncio.gather(*(store.take(key, 50, 7) for _ in range(20)))
    assert taken.count(None) == 7


async def test_what_is_given_back_can_be_taken_again(store):
    key = fresh()
    for _ in range(3):
        assert await store.take(key, 10, 8) is None
        assert await store.take(key, 10, 8) is not None
        await store.give_back(key, 10, 8)


async def test_what_is_given_back_never_becomes_credit(store):
    key = fresh()
    assert await store.take(key, 10, 3) is None
    await asyncio.gather(*(store.give_back(key, 10, 8) for _ in range(3)))
    assert await store.take(key, 10, 10) is None
    assert await store.take(key, 10, 1) is not None


async def test_whether_there_is_room_is_told_without_counting(store):
    key = fresh()
    assert [await store.wait_s(key, 2, 2) for _ in range(3)] == [0, 0, 0]
    assert await store.take(key, 2, 2) is None
    assert 0 < await store.wait_s(key, 2, 1) <= 2 * WINDOW_S


async def test_so_many_are_inside_and_a_place_that_is_left_is_free(store):
    key = fresh()
    assert [await store.enter(key, 2, ticket, LEASE_S) for ticket in "abc"] == [True, True, False]
    await store.leave(key, "a")
    await store.leave(key, "a")  # twice is once
    assert [await store.enter(key, 2, ticket, LEASE_S) for ticket in "de"] == [True, False]


async def test_a_place_that_a_dead_replica_held_is_free_when_its_lease_ends(redis_server):
    store, key = RedisStore(redis_server), fresh()
    assert await store.enter(key, 1, "lost", 0.05)
    async with asyncio.timeout(5):
        while not await store.enter(key, 1, "next", LEASE_S):  # noqa: ASYNC110  # in another process
            await asyncio.sleep(0.01)
    await store.close()


async def test_replicas_with_one_redis_count_together(redis_server):
    key = fresh()
    one, other = RedisStore(redis_server), RedisStore(redis_server)
    assert await one.take(key, 3, 2) is None
    assert await other.take(key, 3, 2) is not None
    assert await one.enter(key, 1, "a", LEASE_S)
    assert not await other.enter(key, 1, "b", LEASE_S)
    await one.close()
    await other.close()


@pytest.mark.parametrize(
    "url", ["http://secret@host", "redis://:secret@host:port", "redis://h?nonsense=secret"]
)
def test_a_url_that_is_none_is_a_config_error_without_it(url):
    with pytest.raises(ConfigError, match="limits_redis_url") as refused:
        RedisStore(url)
    assert "secret@" not in str(refused.value)
    assert refused.value.__cause__ is None


# --- charges -----------------------------------------------------------------------------------------------


def tenant(**limits) -> Tenant:
    return Tenant(fresh(), Limits(**limits))


async def test_each_limit_is_refused_by_its_name_numbers_and_time():
    books = Quotas()
    acme = tenant(requests_per_minute=2, tokens_per_minute=100, concurrency=2)
    first = await books.open(acme, LEASE_S)
    await first.reserve(80, 200)
    with pytest.raises(
        Exhausted, match=r"tokens_per_minute: at most 100 a minute, and 30 more only in"
    ) as spent:
        await first.reserve(30, 90)
    with pytest.raises(Exhausted, match=r"tokens_per_minute: 101 at once, at most 100") as never:
        await first.reserve(101, 300)
    second = await books.open(acme, LEASE_S)
    with pytest.raises(Exhausted, match=r"concurrency: 2 requests are running, at most 2") as busy:
        await books.open(acme, LEASE_S)
    await first.settle()
    await second.settle()
    with pytest.raises(
        Exhausted, match=r"requests_per_minute: at most 2 a minute, and 1 more only in"
    ) as often:
        await books.open(acme, LEASE_S)
    for error in (spent, never, busy, often):
        assert error.value.reason == "QUOTA"
        assert acme.name in str(error.value)
    assert never.value.retry_after_s is None  # no time would help
    assert busy.value.retry_after_s == quotas.BUSY_RETRY_S
    assert 0 < spent.value.retry_after_s <= 2 * WINDOW_S
    assert 0 < often.value.retry_after_s <= 2 * WINDOW_S


async def test_a_refused_request_holds_no_place_and_costs_nothing():
    books, acme = Quotas(), tenant(requests_per_minute=1, concurrency=1)
    await (await books.open(acme, LEASE_S)).settle()
    for _ in range(3):
        with pytest.raises(Exhausted, match="requests_per_minute"):
            await books.open(acme, LEASE_S)


@pytest.mark.parametrize(
    ("error", "kept", "requests_left", "tokens_left"),
    [
        (None, True, 1, 20),
        (InvalidInput("no"), False, 1, 100),
        (Exhausted("tokens", reason="QUOTA"), False, 1, 100),
        (asyncio.CancelledError(), False, 1, 20),
        (Expired("late"), False, 1, 20),
        (Exhausted("queue"), False, 2, 100),
        (Unavailable("gone"), False, 2, 100),
        (Internal("oh"), False, 2, 100),
        (KeyError("oh"), False, 2, 100),
        (Unavailable("gone in the middle"), True, 1, 20),
        (asyncio.CancelledError(), True, 1, 20),
    ],
)
async def test_tokens_come_back_unless_the_client_left_and_requests_if_the_service_failed(
    error, kept, requests_left, tokens_left
):
    books, acme = Quotas(), tenant(requests_per_minute=2, tokens_per_minute=100)
    charge = await books.open(acme, LEASE_S)
    await charge.reserve(80, 200)
    if kept:
        charge.keep()
    await charge.settle(error)
    opened = []
    for _ in range(requests_left):
        opened.append(await books.open(acme, LEASE_S))
    with pytest.raises(Exhausted, match="requests_per_minute"):
        await books.open(acme, LEASE_S)
    await opened[0].reserve(tokens_left, 200)
    with pytest.raises(Exhausted, match="tokens_per_minute"):
        await opened[0].reserve(1, 1)


async def test_who_has_no_token_left_is_refused_before_an_image_is_encoded():
    books, acme = Quotas(), tenant(tokens_per_minute=100, concurrency=1)
    charge = await books.open(acme, LEASE_S)
    await charge.reserve(100, 200)
    charge.keep()
    await charge.settle()
    with pytest.raises(
        Exhausted, match="tokens_per_minute: at most 100 a minute, and 1 more only in"
    ) as refused:
        await books.open(acme, LEASE_S)
    assert refused.value.retry_after_s > 0
    with pytest.raises(Exhausted, match="tokens_per_minute"):  # and holds no place
        await books.open(acme, LEASE_S)


async def test_without_limits_nothing_is_counted_and_a_free_charge_charges_nothing():
    books = Quotas()
    for _ in range(100):
        await (await books.open(tenant(), LEASE_S)).reserve(10**6, 10**6)
    await Charge().reserve(10**9, 10**9)
    assert type(quotas.current()) is Charge


# --- Redis that is down ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "paused"])
async def test_with_redis_down_this_process_counts_for_itself_and_says_so_once(start_redis, how, caplog):
    url, process = start_redis()
    now = [0.0]
    books = Quotas(RedisStore(url), clock=lambda: now[0])
    acme = tenant(requests_per_minute=2, concurrency=3)
    held = await books.open(acme, LEASE_S)
    process.send_signal(how)
    with caplog.at_level(logging.INFO, "hiprune.quotas"):
        for _ in range(2):
            await books.open(acme, LEASE_S)
            now[0] += quotas.REST_S  # so that it is tried again, each time
        with pytest.raises(Exhausted, match="requests_per_minute"):
            await books.open(acme, LEASE_S)
        await held.settle(Unavailable("gone"))  # what was taken in Redis is not given back elsewhere
        with pytest.raises(Exhausted, match="requests_per_minute"):
            await books.open(acme, LEASE_S)
        assert [record.message for record in caplog.records] == [
            message for message in caplog.messages if "in this process alone" in message
        ]
        assert len(caplog.records) == 1
        if how == signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
            now[0] += quotas.REST_S
            async with asyncio.timeout(10):
                while "limits are counted in Redis again" not in caplog.messages:
                    await books.do(lambda store: store.enter(fresh(), 1, "x", LEASE_S))
                    now[0] += quotas.REST_S
    await books.close()


async def test_a_process_that_was_held_up_itself_still_counts_in_redis(redis_server):
    shared = RedisStore(redis_server)
    limits = Quotas(shared)
    for _ in range(2):
        asyncio.get_running_loop().call_soon(time.sleep, 0.3)  # while it connects, and after
        where, _ = await limits.do(lambda at: at.enter("held up", 10, "ticket", 10))
        assert where is shared
    await limits.close()


async def test_places_taken_in_a_redis_that_slept_are_given_back_when_it_wakes(start_redis):
    url, process = start_redis()
    now = [0.0]
    books = Quotas(RedisStore(url), clock=lambda: now[0])
    acme = tenant(concurrency=2)
    before = await books.open(acme, LEASE_S)
    process.send_signal(signal.SIGSTOP)
    # sent on the connection that is there: Redis does it once it wakes, and nobody knows
    during = await books.open(acme, LEASE_S)
    await before.settle()
    await during.settle()
    process.send_signal(signal.SIGCONT)
    now[0] += quotas.REST_S
    await (await books.open(acme, LEASE_S)).settle()
    async with redis.asyncio.Redis.from_url(url) as inside, asyncio.timeout(10):
        while await inside.keys():  # noqa: ASYNC110  # in another process
            await asyncio.sleep(0.01)
    await books.close()


@pytest.mark.parametrize("rubbish", ["list", "text"])
async def test_a_counter_that_somebody_wrote_over_begins_anew(redis_server, rubbish):
    store, key = RedisStore(redis_server), fresh()
    async with redis.asyncio.Redis.from_url(redis_server) as inside:

        async def spoil() -> None:
            for name in await inside.keys(f"*{key}*"):
                await inside.delete(name)
                await (inside.rpush(name, "rubbish") if rubbish == "list" else inside.set(name, "rubbish"))

        assert await store.take(key, 2, 2) is None
        await spoil()
        assert [await store.take(key, 2, 1) is None for _ in range(3)] == [True, True, False]
        assert await store.enter(f"{key}/places", 1, "one", LEASE_S)
        await spoil()
        assert await store.enter(f"{key}/places", 1, "two", LEASE_S)
        assert not await store.enter(f"{key}/places", 1, "three", LEASE_S)
        await spoil()
        await store.leave(f"{key}/places", "two")
    await store.close()
