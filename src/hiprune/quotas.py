"""What tenants are charged: requests and kept visual tokens a minute, and requests at a time.

Knows tenants and numbers; knows no request's content, and of gRPC its errors alone. With Redis slow or down
this process counts for itself: a limit is then one of each process, and a metric says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar

from hiprune import lateness, telemetry
from hiprune.auth import Tenant
from hiprune.errors import Exhausted, Expired, HipruneError, Internal, Unavailable
from hiprune.limit_stores import WINDOW_S, ProcessStore, Store

log = logging.getLogger("hiprune.quotas")

BUDGET_S: Final = 0.1
"""Time for one operation in Redis before this process decides alone."""
REST_S: Final = 2.0
"""For how long a Redis that failed is left alone."""
MAX_OWED: Final = 4096
"""Most places of a tenant that are given back to a Redis that was away, once it answers."""
BUSY_RETRY_S: Final = 1.0
"""When to come back after too many requests at a time: nobody knows when one of them ends."""

Result = TypeVar("Result")


class Quotas:
    """Opens the account of a request. One a process; belongs to one event loop."""

    def __init__(self, shared: Store | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared = shared
        self._own = ProcessStore()
        self._clock = clock
        self._rests_until = -math.inf
        self._is_down = False
        self._owed: dict[str, set[str]] = {}
        self._paying = asyncio.Lock()

    async def open(self, tenant: Tenant, lease_s: float) -> Charge:
        """The charge of one request of a tenant's, within its limits. `lease_s` is the longest it may run.

        Raises Exhausted (QUOTA) naming the limit, its number and when there is room again.
        """
        charge = TenantCharge(self, tenant)
        await charge.enter(lease_s)
        telemetry.count("hiprune.requests", tenant=tenant.name)
        return charge

    async def close(self) -> None:
        """Closes the connection to Redis."""
        if self._shared is not None:
            await self._shared.close()

    async def enter(self, key: str, limit: int, ticket: str, lease_s: float) -> tuple[Store, bool]:
        """Whether there was a place, and where it is.

        A Redis that was paused does what it was sent once it wakes, though nobody waits any more: a place
        that was asked for in vain, or by a client that left, is given back like one that was had.
        """
        try:
            return await self.do(lambda at: at.enter(key, limit, ticket, lease_s), lost=(key, ticket))
        except asyncio.CancelledError:
            self._owe(key, ticket)
            raise

    async def do(
        self, work: Callable[[Store], Awaitable[Result]], *, lost: tuple[str, str] | None = None
    ) -> tuple[Store, Result]:
        """Does something in the shared store; in this process where there is none, or where it fails.

        `lost` is the place that may then be taken there all the same.
        """
        if self._shared is not None:
            if self._clock() >= self._rests_until:
                try:
                    done = await lateness.within(self._ask(self._shared, work), BUDGET_S)
                except Exception as error:
                    if lost is not None:
                        self._owe(*lost)
                    self._rests_until = self._clock() + REST_S
                    if not self._is_down:
                        log.warning(
                            "limits are counted in this process alone: their Redis fails with %s",
                            type(error).__name__,
                        )
                    self._is_down = True
                else:
                    if self._is_down:
                        log.info("limits are counted in Redis again")
                    self._is_down = False
                    return self._shared, done
            telemetry.count("hiprune.limits.fallbacks")
        return self._own, await work(self._own)

    async def _ask(self, store: Store, work: Callable[[Store], Awaitable[Result]]) -> Result:
        await self._pay(store)
        return await work(store)

    async def undo(self, store: Store, work: Callable[[Store], Awaitable[None]]) -> None:
        """Takes something back where it was done. In a Redis that fails it stays, until its time runs out."""
        try:
            async with asyncio.timeout(BUDGET_S):
                await work(store)
        except Exception as error:
            log.debug("not given back: %s", type(error).__name__)

    async def leave(self, store: Store, key: str, ticket: str) -> None:
        """Gives a place back; to a Redis that fails, once it answers again."""
        try:
            async with asyncio.timeout(BUDGET_S):
                await store.leave(key, ticket)
        except Exception as error:
            self._owe(key, ticket)
            log.debug("given back later: %s", type(error).__name__)

    def _owe(self, key: str, *tickets: str) -> None:
        """Remembers places that Redis may hold and nobody has. Beyond a bound they run out by themselves."""
        owed = self._owed.setdefault(key, set())
        owed.update(tickets[: max(0, MAX_OWED - len(owed))])

    async def _pay(self, store: Store) -> None:
        """Gives Redis back what it is owed. Who comes meanwhile waits, or would find the places taken."""
        if not self._owed and not self._paying.locked():
            return
        async with self._paying:
            while self._owed:
                key, tickets = self._owed.popitem()
                try:
                    await store.leave(key, *tickets)
                except BaseException:
                    self._owe(key, *tickets)
                    raise


class Charge:
    """What one request is charged; of this kind nothing, as where another service has done it."""

    async def reserve(self, kept: int, before: int) -> None:
        """Counts visual tokens, once it is known how many are kept. Raises Exhausted (QUOTA)."""

    def keep(self) -> None:
        """Something was generated: what is taken stays taken."""

    async def settle(self, error: BaseException | None = None) -> None:
        """The request is over, by an error or well."""


@dataclass(frozen=True, slots=True)
class _Taken:
    store: Store
    key: str
    limit: int
    cost: int
    at_s: float


class TenantCharge(Charge):
    """What one request of a tenant's is charged, at the first service that it reaches."""

    def __init__(self, quotas: Quotas, tenant: Tenant) -> None:
        self._quotas = quotas
        self._tenant = tenant
        self._account = account_of(tenant.name)
        self._request: _Taken | None = None
        self._tokens: list[_Taken] = []
        self._place: tuple[Store, str] | None = None
        self._ticket = secrets.token_hex(8)
        self._stays = False

    async def enter(self, lease_s: float) -> None:
        """Takes a place, and counts the request. Raises Exhausted (QUOTA)."""
        limits, key = self._tenant.limits, f"{self._account}/concurrency"
        if (most := limits.concurrency) is not None:
            store, entered = await self._quotas.enter(key, most, self._ticket, lease_s)
            if not entered:
                raise self._refusal(
                    "concurrency", f"{most} requests are running, at most {most} may", BUSY_RETRY_S
                )
            self._place = store, key
        try:
            if (most := limits.requests_per_minute) is not None:
                self._request = await self._take("requests_per_minute", most, 1)
            if (most := limits.tokens_per_minute) is not None:
                await self._expect_room(most)
        except BaseException:
            await self._leave()
            raise

    async def reserve(self, kept: int, before: int) -> None:
        """Counts visual tokens, once it is known how many are kept. Raises Exhausted (QUOTA)."""
        if (limit := self._tenant.limits.tokens_per_minute) is not None and kept:
            self._tokens.append(await self._take("tokens_per_minute", limit, kept))
        telemetry.count("hiprune.tokens.before", before, tenant=self._tenant.name)
        telemetry.count("hiprune.tokens.kept", kept, tenant=self._tenant.name)

    def keep(self) -> None:
        """Something was generated: what is taken stays taken."""
        self._stays = True

    async def settle(self, error: BaseException | None = None) -> None:
        """Gives tokens back if nothing was generated, unless the client left or its time ran out.

        By then its image may have been encoded and its prompt read, and who leaves each time before the first
        word would have that for nothing. The request itself counts also when it is refused; unless it is the
        service's doing that there was no answer.
        """
        if not self._stays:
            if isinstance(error, Exception) and not isinstance(error, Expired):
                for each in self._tokens:
                    await self._give_back(each)
            if self._request is not None and _is_ours(error):
                await self._give_back(self._request)
        await self._leave()

    async def _take(self, name: str, limit: int, cost: int) -> _Taken:
        key, at_s = f"{self._account}/{name}", time.monotonic()
        if cost > limit:
            raise self._refusal(name, f"{cost} at once, at most {limit} a minute: waiting does not help")
        store, wait_s = await self._quotas.do(lambda at: at.take(key, limit, cost))
        if wait_s is not None:
            raise self._refusal(
                name, f"at most {limit} a minute, and {cost} more only in {wait_s:.1f} s", wait_s
            )
        return _Taken(store, key, limit, cost, at_s)

    async def _expect_room(self, limit: int) -> None:
        """Refuses a request whose first token would not fit, before an image is encoded for it."""
        key = f"{self._account}/tokens_per_minute"
        _, wait_s = await self._quotas.do(lambda at: at.wait_s(key, limit, 1))
        if wait_s > 0:
            raise self._refusal(
                "tokens_per_minute", f"at most {limit} a minute, and 1 more only in {wait_s:.1f} s", wait_s
            )

    async def _give_back(self, taken: _Taken) -> None:
        if time.monotonic() - taken.at_s < WINDOW_S:  # what is older has faded by itself
            await self._quotas.undo(taken.store, lambda at: at.give_back(taken.key, taken.limit, taken.cost))

    async def _leave(self) -> None:
        if self._place is not None:
            (store, key), self._place = self._place, None
            await self._quotas.leave(store, key, self._ticket)

    def _refusal(self, name: str, what: str, retry_after_s: float | None = None) -> Exhausted:
        telemetry.count("hiprune.requests.rejected", tenant=self._tenant.name, limit=name)
        return Exhausted(
            f"tenant {self._tenant.name!r}: {name}: {what}", reason="QUOTA", retry_after_s=retry_after_s
        )


def account_of(tenant: str) -> str:
    """What a tenant's counts are kept under: not its name, which is not for whoever looks into a Redis.

    No secret goes in, so who guesses a name can check it; the cache's keys do not tell even that.
    """
    return hashlib.sha256(f"hiprune limits 1 {tenant}".encode()).hexdigest()[:32]


def _is_ours(error: BaseException | None) -> bool:
    """Whether a request failed by the service's doing: a peer is gone, a queue full, something went wrong."""
    if isinstance(error, HipruneError):
        overloaded = isinstance(error, Exhausted) and error.reason != "QUOTA"
        return overloaded or isinstance(error, Unavailable | Internal)
    return isinstance(error, Exception)


_charge: ContextVar[Charge] = ContextVar("hiprune_charge", default=Charge())  # noqa: B039  # holds nothing


def current() -> Charge:
    """The charge of the current request; one that charges nothing where another service has done it."""
    return _charge.get()


def enter(charge: Charge) -> None:
    """Sets the charge of the current request."""
    _charge.set(charge)
