"""Single flight: one piece of work for all who want it, that lives as long as somebody waits."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine

import pytest

from hiprune import deadlines
from hiprune.errors import Expired
from services.pruner.flight import SingleFlight


class Work:
    """Work that a test starts, counts and lets go on."""

    def __init__(self, result: object = "done") -> None:
        self.result = result
        self.begun = 0
        self.cancelled = 0
        self.go_on = asyncio.Event()

    async def __call__(self) -> object:
        self.begun += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def flights() -> SingleFlight[str, object]:
    return SingleFlight()


async def waiters(flights, work: Callable[[], Coroutine], count: int, key: str = "k") -> list[asyncio.Task]:
    tasks = [asyncio.create_task(flights.run(key, work)) for _ in range(count)]
    await settle()
    return tasks


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_many_who_want_the_same_share_one_run(flights):
    work = Work()
    tasks = await waiters(flights, work, 20)
    work.go_on.set()
    assert await asyncio.gather(*tasks) == ["done"] * 20
    assert work.begun == 1
    assert len(flights) == 0


async def test_different_keys_run_side_by_side(flights):
    one, two = Work("one"), Work("two")
    first, second = await waiters(flights, one, 1, "1"), await waiters(flights, two, 1, "2")
    assert (one.begun, two.begun, len(flights)) == (1, 1, 2)
    two.go_on.set()
    assert await second[0] == "two"
    one.go_on.set()
    assert await first[0] == "one"


async def test_work_that_is_done_is_not_remembered(flights):
    work = Work()
    work.go_on.set()
    assert await flights.run("k", work) == await flights.run("k", work) == "done"
    assert work.begun == 2


async def test_a_cancelled_leader_does_not_fail_its_followers(flights):
    work = Work()
    leader, *followers = await waiters(flights, work, 4)
    leader.cancel()
    await settle()
    assert leader.cancelled()
    work.go_on.set()
    assert await asyncio.gather(*followers) == ["done"] * 3
    assert (work.begun, work.cancelled) == (1, 0)


async def test_work_stops_when_the_last_waiter_leaves_and_not_before(flights):
    work = Work()
    tasks = await waiters(flights, work, 3)
    for task in tasks[:2]:
        task.cancel()
    await settle()
    assert work.cancelled == 0
    tasks[2].cancel()
    await settle()
    assert work.cancelled == 1
    assert len(flights) == 0


async def test_a_newcomer_after_the_last_has_left_starts_afresh(flights):
    work, fresh = Work("old"), Work("new")
    (only,) = await waiters(flights, work, 1)
    only.cancel()
    newcomer = asyncio.create_task(flights.run("k", fresh))  # before the old work has even noticed
    fresh.go_on.set()
    assert await newcomer == "new"
    assert (work.cancelled, fresh.cancelled) == (1, 0)


async def test_work_that_is_slow_to_stop_does_not_take_the_newcomers_place(flights):
    stopped = asyncio.Event()

    async def stubborn():
        try:
            await asyncio.sleep(20)
        finally:
            await asyncio.shield(stopped.wait())

    (only,) = await waiters(flights, stubborn, 1)
    only.cancel()
    await settle()
    fresh = Work()
    tasks = await waiters(flights, fresh, 1)
    stopped.set()
    await settle()  # the old work ends now, and must not take the new flight off the table
    tasks += await waiters(flights, fresh, 1)
    assert fresh.begun == 1
    fresh.go_on.set()
    assert await asyncio.gather(*tasks) == ["done"] * 2


async def test_a_failure_reaches_all_and_the_next_tries_again(flights):
    work = Work(ValueError("no"))
    tasks = await waiters(flights, work, 3)
    work.go_on.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in found] == ["no"] * 3
    work.result = "yes"
    assert await flights.run("k", work) == "yes"


async def test_a_failure_that_nobody_waits_for_any_more_is_no_noise(flights, caplog):
    async def fail_on_the_way_out():
        try:
            await asyncio.sleep(20)
        finally:
            raise ValueError("no")

    (only,) = await waiters(flights, fail_on_the_way_out, 1)
    only.cancel()
    await settle()
    del only
    gc.collect()
    assert "never retrieved" not in caplog.text


async def run_within(flights, work: Callable[[], Coroutine], seconds: float | None) -> object:
    if seconds is not None:
        deadlines.begin(seconds)
    return await flights.run("k", work)


async def test_work_is_given_the_time_of_who_asks_for_it(flights):
    async def work():
        return deadlines.for_next_hop(60)

    for seconds in (5, 300):
        given_s = await asyncio.create_task(run_within(flights, work, seconds))
        assert seconds - 1 < given_s < seconds
    assert await asyncio.create_task(run_within(flights, work, None)) == 60


async def test_work_under_way_is_given_the_time_of_the_last_who_waits(flights):
    go_on = asyncio.Event()

    async def work():
        await go_on.wait()
        return deadlines.for_next_hop(60)

    tasks = []
    for seconds in (5, 300, 20):
        tasks.append(asyncio.create_task(run_within(flights, work, seconds)))
        await settle()
    go_on.set()
    given_s = await asyncio.gather(*tasks)
    assert given_s[0] == given_s[1] == given_s[2]
    assert 299 < given_s[0] < 300


async def test_what_was_asked_under_an_earlier_deadline_is_asked_again_for_who_has_more_time(flights):
    """Another service was given the leader's time, and cannot be given a follower's later on."""
    given_s, expire = [], asyncio.Event()

    async def work():
        given_s.append(round(deadlines.remaining_s()))
        if len(given_s) == 1:
            await expire.wait()
            raise Expired("no answer in time")
        return "done"

    leader = asyncio.create_task(run_within(flights, work, 5))
    await settle()
    follower = asyncio.create_task(run_within(flights, work, 300))
    await settle()
    expire.set()
    assert await asyncio.gather(leader, follower) == ["done", "done"]
    assert given_s == [5, 300]


async def test_work_whose_time_is_up_for_all_who_wait_is_not_done_again(flights):
    begun, expire = [], asyncio.Event()

    async def work():
        begun.append(1)
        await expire.wait()
        raise Expired("no answer in time")

    leader = asyncio.create_task(run_within(flights, work, 300))
    await settle()
    follower = asyncio.create_task(run_within(flights, work, 5))
    await settle()
    expire.set()
    for each in (leader, follower):
        with pytest.raises(Expired):
            await each
    assert begun == [1]


async def test_a_follower_outlives_a_leader_whose_time_is_up(flights):
    work = Work()

    async def hurried():
        async with asyncio.timeout(0.02):
            return await flights.run("k", work)

    leader = asyncio.create_task(hurried())
    await settle()
    (follower,) = await waiters(flights, work, 1)
    with pytest.raises(TimeoutError):
        await leader
    work.go_on.set()
    assert await follower == "done"
    assert work.begun == 1
