"""Clients that ask without pause, and a judge of every answer. Knows the front door alone.

An answer is right when its text, its tokens and the visual tokens that were kept are those that the same
question had on the quiet stack. A request that fails must say so in time, and that it may be tried again.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from hiprune.client import Answer, Client
from hiprune.errors import Exhausted, Expired, HipruneError, Unavailable
from hiprune.v1 import pruner_service_pb2 as pb
from tests.stacks import picture, questions

CLIENTS: Final = 6
DEADLINE_S: Final = 10.0
GRACE_S: Final = 1.0
"""How late a status may be, on a busy machine."""
HANG_S: Final = 5.0
"""How long after its deadline a request is given up for lost."""
FRESH_EVERY: Final = 3
"""One request in so many shows a picture that no cache has seen."""
PAUSE_S: Final = 0.05
"""Before a client that was refused asks again."""

POLICIES: Final = (
    pb.PrunePolicy(method=pb.METHOD_HIPRUNE),
    pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS),
    pb.PrunePolicy(method=pb.METHOD_NONE),
    pb.PrunePolicy(method=pb.METHOD_HIPRUNE, keep_count=24),
    pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.5),
)


@dataclass(frozen=True, eq=False)
class Ask:
    """A question about a sample picture, and a policy."""

    image: bytes
    question: str
    policy: pb.PrunePolicy
    truth: str
    """What the model says to the whole picture, as the samples have it."""

    async def of(self, client: Client, *, fresh: bool = False) -> Answer:
        """The answer; `fresh` for one that no cache helps with."""
        return await client.ask(
            self.question, renewed(self.image) if fresh else self.image, policy=self.policy
        )


def asks(pictures: int = 8, each: int = 2) -> list[Ask]:
    """Some questions on some pictures under every policy."""
    found: dict[str, list[dict[str, str]]] = {}
    for sample in questions():
        found.setdefault(sample["image"], []).append(sample)
    return [
        Ask(picture(name), sample["question"], policy, sample["unpruned_answer"])
        for name, samples in itertools.islice(found.items(), pictures)
        for sample in samples[:each]
        for policy in POLICIES
    ]


def renewed(png: bytes) -> bytes:
    """The same picture with a comment of its own: other bytes, and so nothing that a cache has seen."""
    text = b"Comment\0" + secrets.token_hex(16).encode()
    chunk = b"tEXt" + text
    whole = struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = png.rindex(b"IEND") - 4
    return png[:end] + whole + png[end:]


Said = tuple[str, tuple[int, ...], tuple[tuple[int, ...], ...]]


def said(answer: Answer) -> Said:
    """What makes an answer right or wrong: its text, its tokens, and which visual tokens were kept."""
    kept = tuple(tuple(view.kept_indices) for media in answer.report.media for view in media.views)
    return answer.text, tuple(answer.completion.token_ids), kept


class Judge:
    """Knows the right answer to every question, from a stack that nothing disturbs."""

    def __init__(self, expected: dict[Ask, Said]) -> None:
        self._expected = expected
        self.asks = list(expected)

    @classmethod
    async def of(cls, client: Client, about: Iterable[Ask]) -> Judge:
        """Asks everything once, one after the other; what is then cached stays so."""
        expected = {ask: said(await ask.of(client)) for ask in about}
        for ask, (text, _, _) in expected.items():
            assert ask.policy.method != pb.METHOD_NONE or text == ask.truth, (ask.question, text)
        return cls(expected)

    def is_right(self, ask: Ask, answer: Answer) -> bool:
        """Whether the answer is what it has to be."""
        return said(answer) == self._expected[ask]


@dataclass
class Tally:
    """How requests ended."""

    right: int = 0
    retryable: Counter[str] = field(default_factory=Counter)
    """By status: refused or given up in time, in a way that says: try again."""
    wrong: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    """Statuses that no client would retry, or that lack what they owe it."""
    late: list[str] = field(default_factory=list)
    """Ended after the deadline and its grace."""
    hung: int = 0

    @property
    def ended(self) -> int:
        """All requests that came to an end of some kind, and those that did not."""
        return self.right + self.refused + len(self.wrong) + len(self.other) + self.hung

    @property
    def refused(self) -> int:
        """All that ended in a status that says: try again."""
        return sum(self.retryable.values())

    def __add__(self, more: Tally) -> Tally:
        return Tally(
            self.right + more.right,
            self.retryable + more.retryable,
            self.wrong + more.wrong,
            self.other + more.other,
            self.late + more.late,
            self.hung + more.hung,
        )

    def __str__(self) -> str:
        retryable = ", ".join(f"{number} {name}" for name, number in sorted(self.retryable.items()))
        return (
            f"{self.right} right, {self.refused} retryable{f' ({retryable})' if retryable else ''}, "
            f"{len(self.wrong)} wrong, {len(self.other)} other, {len(self.late)} late, {self.hung} hung"
        )


class Load:
    """Clients at work: `async with Load(address, judge, key=key) as load: …`; in the end, their last answers
    are waited for.
    """

    def __init__(
        self,
        address: str,
        judge: Judge,
        *,
        key: str = "",
        clients: int = CLIENTS,
        deadline_s: float = DEADLINE_S,
        fresh_every: int = FRESH_EVERY,
    ) -> None:
        self._address = address
        self._judge = judge
        self._key = key
        self._deadline_s = deadline_s
        self._fresh_every = fresh_every
        self._turns = itertools.count()
        self._leaving = False
        self._clients = clients
        self._workers: list[asyncio.Task[None]] = []
        self.known, self.fresh = Tally(), Tally()
        """Of pictures that the cache may hold, and of new ones."""
        self._phase = 0
        self._in_a_row = 0

    async def __aenter__(self) -> Self:
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._clients)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        await asyncio.gather(*self._workers)

    @property
    def tally(self) -> Tally:
        """All requests so far."""
        return self.known + self.fresh

    async def right(self, more: int, *, within_s: float = 30) -> None:
        """Returns when so many in a row that began after this call were answered rightly."""
        self._phase += 1
        self._in_a_row = 0
        await until(
            lambda: self._in_a_row >= more, within_s, lambda: f"{self._in_a_row} of {more}: {self.tally}"
        )

    async def ended(self, more: int, *, within_s: float = 30) -> None:
        """Returns when so many more have ended, however that is."""
        whole = self.tally.ended + more
        await until(lambda: self.tally.ended >= whole, within_s, lambda: str(self.tally))

    async def _work(self) -> None:
        async with Client(self._address, key=self._key, timeout_s=self._deadline_s) as client:
            while not self._leaving:
                turn = next(self._turns)
                fresh = turn % self._fresh_every == 0
                ask = self._judge.asks[turn % len(self._judge.asks)]
                phase = self._phase
                ended_well = await judged(
                    self._judge,
                    client,
                    ask,
                    self.fresh if fresh else self.known,
                    deadline_s=self._deadline_s,
                    fresh=fresh,
                )
                if phase == self._phase:
                    self._in_a_row = self._in_a_row + 1 if ended_well else 0
                if not ended_well:
                    await asyncio.sleep(PAUSE_S)


async def judged(
    judge: Judge, client: Client, ask: Ask, tally: Tally, *, deadline_s: float, fresh: bool = False
) -> bool:
    """Asks once and notes how it ended; whether it was answered rightly."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    try:
        async with asyncio.timeout(deadline_s + HANG_S):
            answer = await ask.of(client, fresh=fresh)
    except TimeoutError:
        tally.hung += 1
        return False
    except (Unavailable, Exhausted, Expired) as error:
        if isinstance(error, Exhausted) and error.retry_after_s is None:
            tally.other.append(f"{error.code.name} without RetryInfo: {error}")
        else:
            tally.retryable[f"{error.code.name} {error.reason}"] += 1
    except HipruneError as error:
        tally.other.append(f"{error.code.name}: {error}")
    except Exception as error:
        tally.other.append(repr(error))
    else:
        if judge.is_right(ask, answer):
            tally.right += 1
            return True
        tally.wrong.append(f"{ask.question!r}: {said(answer)}")
    took_s = loop.time() - began_s
    if took_s > deadline_s + GRACE_S:
        tally.late.append(f"{took_s:.1f} s")
    return False


async def until(
    holds: Callable[[], object], within_s: float = 30, state: Callable[[], str] = lambda: ""
) -> None:
    """Returns when something holds. Fails with the state when that takes too long."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + within_s
    while not holds():
        assert loop.time() < end_s, f"not within {within_s:.0f} s: {state()}"
        await asyncio.sleep(0.01)
