"""Single flight across pruners: one makes an entry, the others find it; in any trouble, everybody works."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import pytest

from hiprune import telemetry
from services.pruner import replicas
from services.pruner.redis_store import RedisStore
from services.pruner.replicas import Replicas
from tests.unit.test_flight import Work, settle

PATIENT_S = 20.0


class Entries:
    """The entries that all pruners see."""

    def __init__(self) -> None:
        self.held: dict[bytes, object] = {}


class Pruner:
    """One of several pruners: its store, and how often its encoder ran."""

    def __init__(self, store, entries: Entries) -> None:
        self.store = store
        self.replicas = Replicas(store.claims if store is not None else None)
        self.entries = entries
        self.stored = asyncio.Event()
        self.stored.set()
        self.keeps = True
        self.finds = 0

    async def once(self, key: bytes, work: Work, wait_s: float = PATIENT_S) -> object:
        async def find():
            self.finds += 1
            return self.entries.held.get(key)

        async def make():
            result = await work()

            async def store():
                await self.stored.wait()
                if self.keeps:
                    self.entries.held[key] = result

            return result, asyncio.ensure_future(store())

        return await self.replicas.once(key, find=find, make=make, wait_s=wait_s)


@pytest.fixture
def key(request) -> bytes:
    return b"hiprune:v1:{replicas}:l:" + request.node.name.encode()


@pytest.fixture
async def pruners(redis_server):
    """Three pruners, each with its own connections to one Redis."""
    entries = Entries()
    made = [Pruner(RedisStore(redis_server, ttl_s=60, timeout_s=5), entries) for _ in range(3)]
    yield made
    for each in made:
        await each.replicas.close()
        await each.store.close()


@pytest.fixture
def joins(monkeypatch) -> list[dict[str, str]]:
    """Labels of every join that is counted."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(
        telemetry, "count", lambda name, amount=1, **labels: seen.append({"name": name, **labels})
    )
    return seen


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Returns when another process's state is what a test waits for."""
    async with asyncio.timeout(PATIENT_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def begun(work: Work) -> None:
    """Returns when somebody works."""

    async def has_begun() -> int:
        return work.begun

    await until(has_begun)


async def claimed(pruner: Pruner, key: bytes) -> None:
    """Returns when somebody claims the key."""
    await until(lambda: pruner.store.is_claimed(key))


async def free(pruner: Pruner, key: bytes) -> None:
    """Returns when nobody claims the key."""

    async def is_free() -> bool:
        return await pruner.store.is_claimed(key) is False

    await until(is_free)


async def lead(pruner: Pruner, key: bytes, work: Work) -> asyncio.Task[object]:
    """Has a pruner begin, and returns once the others can see that."""
    task = asyncio.create_task(pruner.once(key, work))
    await claimed(pruner, key)
    await begun(work)
    return task


async def test_pruners_that_miss_the_same_entry_run_one_encoder(pruners, key, joins):
    work, others = Work(), [Work("not needed"), Work("not needed")]
    leading = await lead(pruners[0], key, work)
    following = [
        asyncio.create_task(each.once(key, mine)) for each, mine in zip(pruners[1:], others, strict=True)
    ]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in following)
    work.go_on.set()
    assert await leading == "done"
    assert await asyncio.gather(*following) == ["done"] * 2
    assert (work.begun, others[0].begun, others[1].begun) == (1, 0, 0)
    assert joins == [{"name": "hiprune.cache.joins", "scope": "replicas"}] * 2
    await free(pruners[0], key)


async def test_a_follower_is_let_in_when_the_entry_can_be_found_and_not_when_it_is_made(pruners, key):
    work = Work()
    pruners[0].stored.clear()
    leading = await lead(pruners[0], key, work)
    following = asyncio.create_task(pruners[1].once(key, Work("not needed")))
    work.go_on.set()
    assert await leading == "done"  # the leader waits for no store
    await asyncio.sleep(0.05)
    assert not following.done()
    pruners[0].stored.set()
    assert await following == "done"


async def test_an_entry_that_was_made_between_a_miss_and_the_claim_is_found(pruners, key):
    pruners[0].entries.held[key] = "made meanwhile"
    work = Work()
    assert await pruners[0].once(key, work) == "made meanwhile"
    assert work.begun == 0
    await free(pruners[0], key)


async def test_nobody_queues_behind_a_second_leader(pruners, key):
    """An entry that is not kept, too large perhaps, is made by all at once and not by one after the other."""
    for each in pruners:
        each.keeps = False
    work, others = Work(), [Work("mine"), Work("mine")]
    leading = await lead(pruners[0], key, work)
    following = [
        asyncio.create_task(each.once(key, mine)) for each, mine in zip(pruners[1:], others, strict=True)
    ]
    await asyncio.sleep(0.02)
    work.go_on.set()
    await leading
    await asyncio.gather(*(begun(mine) for mine in others))
    for mine in others:
        mine.go_on.set()
    assert await asyncio.gather(*following) == ["mine"] * 2


async def test_a_follower_waits_no_longer_than_it_may(pruners, key):
    leading = await lead(pruners[0], key, work := Work())
    mine = Work("mine")
    mine.go_on.set()
    since = time.monotonic()
    assert await pruners[1].once(key, mine, wait_s=0.1) == "mine"
    assert time.monotonic() - since < PATIENT_S / 2
    assert not leading.done()
    work.go_on.set()
    assert await leading == "done"


async def test_a_leader_that_fails_or_is_cancelled_lets_the_others_go_on(pruners, key):
    failing = Work(ValueError("no"))
    leading = await lead(pruners[0], key, failing)
    second = Work("second")
    following = asyncio.create_task(pruners[1].once(key, second))
    await settle()
    failing.go_on.set()
    with pytest.raises(ValueError, match="no"):
        await leading
    await claimed(pruners[1], key)
    await begun(second)
    third = Work("third")
    third.go_on.set()
    waiting = asyncio.create_task(pruners[2].once(key, third))
    await asyncio.sleep(0.02)
    assert third.begun == 0
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert await waiting == "third"


async def test_a_leader_that_dies_holds_nobody_up_for_long(pruners, key, monkeypatch):
    monkeypatch.setattr(replicas, "CLAIM_S", 0.3)
    assert await pruners[0].store.claim(key, b"of a process that is gone", 0.3)
    mine = Work("mine")
    mine.go_on.set()
    assert await pruners[1].once(key, mine) == "mine"


async def test_a_claim_lasts_as_long_as_the_work(pruners, key, monkeypatch):
    monkeypatch.setattr(replicas, "CLAIM_S", 0.3)
    leading = await lead(pruners[0], key, work := Work())
    others = Work("not needed")
    following = asyncio.create_task(pruners[1].once(key, others))
    await asyncio.sleep(0.8)  # more than two claims' time
    assert await pruners[1].store.is_claimed(key)
    assert others.begun == 0
    work.go_on.set()
    assert await asyncio.gather(leading, following) == ["done", "done"]


async def test_without_a_store_that_is_shared_or_that_answers_everybody_works(tmp_path):
    gone = RedisStore(f"unix://{tmp_path}/nobody.sock", ttl_s=60, timeout_s=0.2)
    for store in (None, gone):
        pruner, work = Pruner(store, Entries()), Work()
        work.go_on.set()
        assert await pruner.once(b"k", work) == "done"
        assert (work.begun, pruner.finds) == (1, 0)
        await pruner.replicas.close()
    await gone.close()


async def test_a_store_that_stops_answering_while_somebody_waits_ends_the_wait(pruners, key):
    leading = await lead(pruners[0], key, work := Work())
    mine = Work("mine")
    mine.go_on.set()

    async def nothing(key):
        return None

    pruners[1].store.is_claimed = nothing
    assert await pruners[1].once(key, mine) == "mine"
    work.go_on.set()
    await leading
