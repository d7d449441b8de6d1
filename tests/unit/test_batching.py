"""Requests that arrive together run together, within bounds, and nobody pays for another's trouble."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from hiprune.errors import Exhausted, Unavailable
from services.encoder.batching import MicroBatcher, Outcome

LONG_MS = 60_000.0  # nobody waits as long: a test that needs it to pass would time out


class Model:
    """Negates numbers on the worker thread. Records its batches, and runs them while its gate is open."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.failures: dict[int, Exception] = {}  # by item
        self._entered = threading.Semaphore(0)

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        self._entered.release()
        assert self.gate.wait(timeout=5)
        for item in items:
            if item in self.failures:
                raise self.failures[item]
        return [-item for item in items]

    async def entered(self) -> None:
        """Returns when one more batch has started."""
        assert await asyncio.to_thread(self._entered.acquire, timeout=5)


@pytest.fixture
def model() -> Model:
    return Model()


Make = Callable[..., MicroBatcher[int, int]]


@pytest.fixture
async def make(model: Model) -> AsyncIterator[Make]:
    """Builds batchers whose items cost what they are, and closes them."""
    made: list[MicroBatcher[int, int]] = []

    def build(run: Callable[[list[int]], list[int]] = model, **options: Any) -> MicroBatcher[int, int]:
        defaults: dict[str, Any] = {
            "cost": abs,
            "max_batch_cost": 10,
            "max_queue_cost": 100,
            "max_wait_ms": 0.0,
        }
        made.append(MicroBatcher(run, **(defaults | options)))
        return made[-1]

    yield build
    model.gate.set()
    for batcher in made:
        await batcher.close()


def start(batcher: MicroBatcher[int, int], *items: int) -> list[asyncio.Task[Outcome[int]]]:
    return [asyncio.create_task(batcher.submit(item)) for item in items]


async def settle() -> None:
    """Let every task run until it waits for something other than the loop."""
    for _ in range(5):
        await asyncio.sleep(0)


async def busy(batcher: MicroBatcher[int, int], model: Model, item: int = 1) -> asyncio.Task[Outcome[int]]:
    """A batch of `item` that runs until the gate opens."""
    model.gate.clear()
    (running,) = start(batcher, item)
    await model.entered()
    return running


async def test_everyone_gets_the_result_of_their_own_item(make: Make, model: Model) -> None:
    outcomes = await asyncio.gather(*start(make(), 3, 1, 2, 4, 9, 5))
    assert [outcome.result for outcome in outcomes] == [-3, -1, -2, -4, -9, -5]


async def test_items_submitted_together_share_a_batch(make: Make, model: Model) -> None:
    outcomes = await asyncio.gather(*start(make(), 1, 2, 3))
    assert model.batches == [[1, 2, 3]]
    assert {outcome.batch_size for outcome in outcomes} == {3}


async def test_items_that_arrive_while_a_batch_runs_form_the_next(make: Make, model: Model) -> None:
    batcher = make(max_wait_ms=0)
    first = await busy(batcher, model)
    second = start(batcher, 2)
    await settle()
    third = start(batcher, 3)
    await settle()
    model.gate.set()
    await asyncio.gather(first, *second, *third)
    assert model.batches == [[1], [2, 3]]


async def test_batches_keep_to_their_cost_and_to_the_order_of_arrival(make: Make, model: Model) -> None:
    await asyncio.gather(*start(make(max_batch_cost=10), 4, 6, 5, 6, 1, 3, 9))
    assert model.batches == [[4, 6], [5], [6, 1, 3], [9]]  # 1 would fit beside 5, but does not overtake 6


async def test_an_item_dearer_than_a_batch_runs_alone(make: Make, model: Model) -> None:
    await asyncio.gather(*start(make(max_batch_cost=10), 1, 25, 2))
    assert model.batches == [[1], [25], [2]]


async def test_an_idle_batcher_waits_for_company(make: Make, model: Model) -> None:
    batcher = make(max_wait_ms=LONG_MS, max_batch_cost=10)
    early = start(batcher, 4)
    await settle()
    late = start(batcher, 6)
    await asyncio.wait_for(asyncio.gather(*early, *late), timeout=5)
    assert model.batches == [[4, 6]]


async def test_an_item_without_company_goes_when_the_wait_is_over(make: Make) -> None:
    outcome = await asyncio.wait_for(make(max_wait_ms=20).submit(1), timeout=5)
    assert outcome.queued_s >= 0.019
    assert outcome.batch_size == 1


async def test_a_full_batch_does_not_wait_for_more_company(make: Make, model: Model) -> None:
    batcher = make(max_wait_ms=LONG_MS, max_batch_cost=10)
    for _ in range(2):  # the second time from idle again
        await asyncio.wait_for(asyncio.gather(*start(batcher, 4, 6)), timeout=5)
    assert model.batches == [[4, 6], [4, 6]]


async def test_without_a_wait_an_item_goes_at_once(make: Make) -> None:
    outcome = await make(max_wait_ms=0).submit(1)
    assert outcome.queued_s < 0.5


async def test_what_waited_while_a_batch_ran_waits_for_no_more_company(make: Make, model: Model) -> None:
    batcher = make(max_wait_ms=LONG_MS, max_batch_cost=10)
    first = await busy(batcher, model, item=10)
    second = start(batcher, 1)
    await settle()
    model.gate.set()
    await asyncio.wait_for(asyncio.gather(first, *second), timeout=5)


async def test_batches_run_on_one_thread_that_is_not_the_event_loop(make: Make, model: Model) -> None:
    batcher = make(max_batch_cost=1)
    running = await busy(batcher, model)
    others = start(batcher, 1, 1)
    await settle()  # the loop lives while the model runs
    assert batcher.depth == 2
    model.gate.set()
    await asyncio.gather(running, *others)
    assert len(model.batches) == 3
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


async def test_outcomes_tell_the_wait_and_the_run(make: Make, model: Model) -> None:
    batcher = make()
    running = await busy(batcher, model)
    (waiting,) = start(batcher, 2)
    await asyncio.sleep(0.03)
    model.gate.set()
    first, second = await running, await waiting
    assert first.ran_s >= 0.025
    assert second.queued_s >= 0.025
    assert (first.batch_size, second.batch_size) == (1, 1)


async def test_depth_is_the_cost_of_what_waits(make: Make, model: Model) -> None:
    batcher = make()
    assert batcher.depth == 0
    running = await busy(batcher, model, item=7)
    assert batcher.depth == 0
    waiting = start(batcher, 2, 3)
    await settle()
    assert batcher.depth == 5
    model.gate.set()
    await asyncio.gather(running, *waiting)
    assert batcher.depth == 0


async def test_a_full_queue_refuses_and_names_its_bound(make: Make, model: Model) -> None:
    batcher = make(max_queue_cost=10, unit="cups")
    running = await busy(batcher, model)
    waiting = start(batcher, 6, 4)
    await settle()
    with pytest.raises(Exhausted, match="10 cups wait, 1 more; at most 10") as caught:
        await batcher.submit(1)
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    with pytest.raises(Exhausted, match="10 cups wait, 1 more; at most 10"):
        batcher.check_room()  # without an item to submit
    batcher.check_room("another")  # which the first makes room for
    model.gate.set()
    await asyncio.gather(running, *waiting)
    assert (await batcher.submit(1)).result == -1


async def test_the_retry_hint_follows_the_queue_and_the_time_of_recent_batches(
    make: Make, model: Model
) -> None:
    batcher = make(max_batch_cost=10, max_queue_cost=40)

    async def hint() -> float:
        with pytest.raises(Exhausted) as caught:
            await batcher.submit(40)
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s

    running = await busy(batcher, model)
    waiting = start(batcher, 10)
    await settle()
    one_batch = await hint()
    waiting += start(batcher, 10, 10)
    await settle()
    assert await hint() == pytest.approx(3 * one_batch)
    model.gate.set()
    await asyncio.gather(running, *waiting)
    for _ in range(10):  # of no time at all
        await batcher.submit(1)

    running = await busy(batcher, model)
    waiting = start(batcher, 10)
    await settle()
    assert await hint() < 0.2 * one_batch
    model.gate.set()
    await asyncio.gather(running, *waiting)


async def test_an_item_dearer_than_the_queue_is_taken_when_nobody_waits(make: Make, model: Model) -> None:
    batcher = make(max_queue_cost=10)
    running = await busy(batcher, model)
    (dear,) = start(batcher, 11)
    await settle()
    with pytest.raises(Exhausted):
        await batcher.submit(1)
    model.gate.set()
    assert (await dear).result == -11
    await running


async def test_an_item_cancelled_in_the_queue_costs_nothing(make: Make, model: Model) -> None:
    batcher = make(max_queue_cost=10)
    running = await busy(batcher, model)
    gone, stays = start(batcher, 7, 3)
    await settle()
    gone.cancel()
    await settle()
    assert batcher.depth == 3
    (takes_the_room,) = start(batcher, 5)
    model.gate.set()
    assert (await takes_the_room).result == -5
    await asyncio.gather(running, stays)
    assert model.batches == [[1], [3, 5]]


@pytest.mark.parametrize("stays", [True, False], ids=["beside one that stays", "with all others"])
async def test_an_item_cancelled_as_the_batch_before_it_ends_costs_nothing(
    make: Make, model: Model, stays: bool
) -> None:
    batcher = make()
    running = await busy(batcher, model)
    others = start(batcher, 2, 3, 4)
    await settle()
    model.gate.set()
    # a loop that stalls hears of both in one turn: of the end of the batch, and of who leaves
    batcher._worker.submit(int).result()
    for task in others[stays:]:
        task.cancel()
    await asyncio.gather(running, *others, return_exceptions=True)
    assert (await batcher.submit(5)).result == -5
    assert model.batches == [[1], *([[2]] if stays else []), [5]]


async def test_items_all_cancelled_while_they_wait_for_company_run_nothing(make: Make, model: Model) -> None:
    batcher = make(max_wait_ms=5)
    tasks = start(batcher, 1, 2)
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert batcher.depth == 0
    assert (await batcher.submit(3)).result == -3
    assert model.batches == [[3]]


async def test_an_item_cancelled_while_it_runs_leaves_its_batch_alone(make: Make, model: Model) -> None:
    model.gate.clear()
    batcher = make()
    gone, stays = start(batcher, 1, 2)
    await model.entered()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    model.gate.set()
    assert (await stays).result == -2
    assert batcher.depth == 0


@pytest.mark.parametrize("failure", [ValueError("no memory"), StopIteration()])
async def test_an_item_that_fails_fails_alone(make: Make, model: Model, failure: Exception) -> None:
    batcher = make()
    model.failures[2] = failure
    tasks = start(batcher, 1, 2, 3)
    one, two, three = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=5)
    assert model.batches == [[1, 2, 3], [1], [2], [3]]
    assert isinstance(two, Exception)
    assert failure in (two, two.__cause__)
    assert [(each.result, each.batch_size) for each in (one, three)] == [(-1, 1), (-3, 1)]  # type: ignore[union-attr]
    assert (await batcher.submit(4)).result == -4


async def test_too_much_together_is_run_one_by_one_for_those_who_still_wait(make: Make, model: Model) -> None:
    def run(items: list[int]) -> list[int]:
        results = model(items)
        if len(items) > 1:
            raise MemoryError
        return results

    batcher = make(run)
    model.gate.clear()
    leaves, *stay = start(batcher, 1, 2, 3)
    await model.entered()
    leaves.cancel()
    await settle()
    model.gate.set()
    assert [(await each).result for each in stay] == [-2, -3]
    assert model.batches == [[1, 2, 3], [2], [3]]


async def test_a_failed_batch_does_not_take_the_waiting_with_it(make: Make, model: Model) -> None:
    batcher = make()
    model.failures[1] = ValueError("no memory")
    failing = await busy(batcher, model, item=1)
    (waiting,) = start(batcher, 2)
    await settle()
    model.gate.set()
    with pytest.raises(ValueError, match="no memory"):
        await failing
    assert (await waiting).result == -2


async def test_a_run_that_loses_a_result_is_an_error_and_not_a_shift(make: Make) -> None:
    batcher = make(lambda items: items[1:])
    results = await asyncio.gather(*start(batcher, 1, 2), return_exceptions=True)
    assert [str(result) for result in results] == ["0 results for a batch of 1"] * 2


async def test_a_cost_that_fails_is_its_own_submitters_trouble(make: Make) -> None:
    def cost(item: int) -> int:
        return 10 // item

    batcher = make(cost=cost)
    with pytest.raises(ZeroDivisionError):
        await batcher.submit(0)
    assert (await batcher.submit(5)).result == -5


async def test_close_finishes_what_is_here_and_refuses_what_comes(make: Make, model: Model) -> None:
    batcher = make(max_batch_cost=2)
    running = await busy(batcher, model)
    waiting = start(batcher, 2, 2)
    await settle()
    closing = asyncio.create_task(batcher.close())
    await settle()
    with pytest.raises(Unavailable):
        await batcher.submit(1)
    assert not closing.done()
    model.gate.set()
    await closing
    results = [task.result().result for task in (running, *waiting)]
    assert results == [-1, -2, -2]
    assert model.batches == [[1], [2], [2]]


async def test_close_does_not_wait_for_company(make: Make) -> None:
    batcher = make(max_wait_ms=LONG_MS)
    (task,) = start(batcher, 1)
    await settle()
    await asyncio.wait_for(batcher.close(), timeout=5)
    assert (await task).result == -1


async def test_close_twice_or_unused_is_harmless(make: Make) -> None:
    batcher = make()
    await batcher.close()
    await batcher.close()
    with pytest.raises(Unavailable):
        await batcher.submit(1)


async def test_a_cancelled_close_leaves_the_work_alone(make: Make, model: Model) -> None:
    batcher = make()
    running = await busy(batcher, model)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.close(), timeout=0.01)
    model.gate.set()
    assert (await running).result == -1
    await batcher.close()
