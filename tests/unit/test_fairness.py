"""Claims about queues in which tenants take turns."""

from __future__ import annotations

import asyncio
import random

import pytest

from hiprune import fairness
from hiprune.errors import Exhausted
from hiprune.fairness import FairQueue, Turns


def queue_of(*items: tuple[str, int]) -> FairQueue[str]:
    """Items `a1`, `a2`, … of owner a, in the order given as (owner, cost)."""
    queue: FairQueue[str] = FairQueue()
    counts: dict[str, int] = {}
    for owner, cost in items:
        counts[owner] = counts.get(owner, 0) + 1
        queue.push(owner, f"{owner}{counts[owner]}", cost)
    return queue


def emptied(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_owners_take_turns_and_their_own_items_keep_their_order():
    queue = queue_of(*[("a", 1)] * 4, *[("b", 1)] * 2, ("c", 1))
    assert emptied(queue) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_turns_are_in_proportion_to_cost():
    queue = queue_of(*[("a", 4)] * 4, *[("b", 1)] * 8)
    assert emptied(queue) == ["a1", "b1", "b2", "b3", "b4", "a2", "b5", "b6", "b7", "b8", "a3", "a4"]


def test_who_comes_late_is_neither_behind_the_flood_nor_owed_the_past():
    queue = queue_of(*[("a", 1)] * 100)
    assert [queue.pop() for _ in range(50)] == [f"a{n}" for n in range(1, 51)]
    for number in range(3):
        queue.push("b", f"b{number}", 1)
    assert [queue.pop() for _ in range(6)] == ["b0", "a51", "b1", "a52", "b2", "a53"]


def test_what_is_taken_out_costs_nothing_any_more():
    queue = queue_of(("a", 3), ("a", 5), ("b", 2))
    assert queue.remove("a", "a1")
    assert not queue.remove("a", "a1")
    assert not queue.remove("nobody", "a1")
    assert (len(queue), queue.cost) == (2, 7)
    assert queue.next_cost() == 5
    assert emptied(queue) == ["a2", "b1"]
    assert queue.cost == 0
    with pytest.raises(IndexError):
        queue.pop()


def test_what_is_discarded_costs_nothing_and_all_else_keeps_its_turn():
    queue = FairQueue()
    for number in range(3):
        queue.push("a", f"a{number}", 10)
        queue.push("b", f"b{number}", 10)
    queue.discard(lambda item: item in {"a0", "a1", "b2"})
    assert (len(queue), queue.cost) == (3, 30)
    assert [queue.pop() for _ in range(3)] == ["a2", "b0", "b1"]


def test_room_is_made_at_the_cost_of_whoever_has_most_and_newest_first():
    queue = queue_of(*[("a", 2)] * 5, ("b", 2))
    assert queue.make_room("c", 3, 12) == ["a5", "a4"]
    queue.push("c", "c1", 3)
    assert queue.cost == 11
    assert queue.make_room("c", 1, 12) == []
    assert queue.make_room("a", 2, 12) is None  # its own flood makes no room for it
    assert queue.make_room("c", 4, 12) is None  # it would have more than anybody
    assert queue.cost == 11


def test_nobody_is_thrown_out_in_vain():
    queue = queue_of(*[("a", 2)] * 5)
    assert queue.make_room("b", 11, 10) is None
    assert len(queue) == 5


def test_owners_who_always_wait_are_served_alike_whatever_their_items_cost():
    rng = random.Random(7)
    queue: FairQueue[tuple[str, int]] = FairQueue()
    served = dict.fromkeys(("small", "large", "mixed"), 0)
    ranges = {"small": (1, 2), "large": (30, 40), "mixed": (1, 40)}
    for owner, (low, high) in ranges.items():
        for cost in (rng.randint(low, high) for _ in range(2000)):
            queue.push(owner, (owner, cost), cost)
    for _ in range(1000):
        owner, cost = queue.pop()
        served[owner] += cost
        assert max(served.values()) - min(served.values()) <= 2 * 40


@pytest.mark.parametrize("cost", [1, 7, 1000])
@pytest.mark.parametrize("others", [1, 3, 20])
def test_one_running_and_one_waiting_has_its_share_and_no_more(cost, others):
    floods = [f"flood {number}" for number in range(others)]
    queue: FairQueue[str] = FairQueue()
    queue.push("pair", "pair", cost)
    for flood in floods * 40:
        queue.push(flood, flood, 1)
    served = dict.fromkeys(["pair", *floods], 0)
    while sum(served[flood] for flood in floods) < 30 * others:
        owner = queue.pop()
        served[owner] += cost if owner == "pair" else 1
        if owner == "pair":
            queue.push("pair", "pair", cost)  # back at once: its line was empty only in between
        counts = [served[flood] for flood in floods]
        assert max(counts) - min(counts) <= 1
        assert min(counts) - 1 <= served["pair"] <= max(counts) + cost


def test_nothing_is_owed_once_all_was_at_rest():
    queue = queue_of(("a", 1000))
    queue.pop()
    queue.rest()
    for owner in "ab":
        queue.push(owner, owner, 1)
    assert emptied(queue) == ["a", "b"]


def test_what_did_not_have_to_wait_counts_too():
    queue: FairQueue[str] = FairQueue()
    queue.charge("a", 3)
    for number in range(4):
        queue.push("a", f"a{number}", 1)
        queue.push("b", f"b{number}", 1)
    assert [queue.pop() for _ in range(4)] == ["b0", "b1", "b2", "a0"]


def test_the_past_of_a_bounded_number_is_remembered_and_the_longest_first(monkeypatch):
    monkeypatch.setattr(fairness, "MAX_ENDS", 10)
    queue = queue_of(("last", 5), *[(f"owner {number}", 10 + number) for number in range(100)])
    for _ in range(101):
        queue.pop()
        assert len(queue._ends) <= 10
    assert min(queue._ends.values()) >= 10 + 90
    queue.push("last", "again", 200)
    queue.pop()
    queue.push("owner 0", "new", 1000)
    queue.pop()
    assert set(queue._ends) >= {"last", "owner 0"}


def refused() -> Exhausted:
    return Exhausted("full")


async def test_so_many_run_at_a_time_and_the_others_in_turn():
    turns = Turns(2, 100, refused)
    order: list[str] = []
    running = 0
    gate = asyncio.Event()

    async def work(owner: str) -> None:
        nonlocal running
        async with turns.take(owner):
            running += 1
            assert running <= 2
            order.append(owner)
            await gate.wait()
            await asyncio.sleep(0)
            running -= 1

    tasks = [asyncio.create_task(work("a")) for _ in range(6)]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(work("b")) for _ in range(2)]
    await asyncio.sleep(0)
    assert (order, turns.waiting) == (["a", "a"], 6)
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "a", "b", "a", "b", "a", "a", "a"]
    assert turns.waiting == running == 0


@pytest.mark.parametrize("width", [1, 3])
async def test_few_clients_of_one_owner_do_not_starve_the_many_of_another(width):
    turns = Turns(width, 100, refused)
    served = {"many": 0, "few": 0}

    async def client(owner: str) -> None:
        while sum(served.values()) < 300:
            async with turns.take(owner):
                await asyncio.sleep(0)
            served[owner] += 1

    await asyncio.gather(*(client("many") for _ in range(10)), *(client("few") for _ in range(2 * width)))
    assert abs(served["many"] - served["few"]) <= 0.1 * 300


async def test_a_full_queue_refuses_the_flood_and_makes_room_for_others():
    turns = Turns(1, 2, refused)
    gate = asyncio.Event()

    async def work(owner: str) -> str:
        async with turns.take(owner):
            await gate.wait()
            return owner

    flood = [asyncio.create_task(work("a")) for _ in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert isinstance(flood[3].exception(), Exhausted)
    other = asyncio.create_task(work("b"))
    gate.set()
    assert await other == "b"
    done = await asyncio.gather(*flood, return_exceptions=True)
    assert [isinstance(each, Exhausted) for each in done] == [False, False, True, True]


async def test_who_leaves_gives_the_turn_on_whenever_it_leaves():
    turns = Turns(1, 10, refused)
    gate = asyncio.Event()

    async def work() -> None:
        async with turns.take("a"):
            await gate.wait()

    running, leaves, in_the_moment, stays = (asyncio.create_task(work()) for _ in range(4))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.sleep(0)
    assert turns.waiting == 2
    gate.set()
    await running  # the turn is now the third's, who has not noticed yet
    in_the_moment.cancel()
    await asyncio.wait_for(stays, 5)
    await asyncio.gather(leaves, in_the_moment, return_exceptions=True)
    async with turns.take("b"):
        assert turns.waiting == 0
