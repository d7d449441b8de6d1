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

from hiprune import telemetry
from hiprune.auth import Tenant
from hiprune.errors import Exhausted, HipruneError, Internal, Unavailable
from hiprune.limit_stores import WINDOW_S, ProcessStore, Store

log = logging.getLogger("hiprune.quotas")

BUDGET_S: Final = 0.1
"""Time for one operation in Redis before this process decides alone."""
REST_S: Final = 2.0
"""For how long a Redis that failed is left alone."""
MAX_OWED: Final = 4096
"""Places that are given back to a Redis that was away, once it answers; older ones run out by themselves."""
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
        self._owed: list[Callable[[Store], Awaitable[None]]] = []
        self._paying: set[asyncio.Task[None]] = set()

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
        for task in self._paying:
            task.cancel()
        if self._shared is not None:
            await self._shared.close()

    async def do(
        self,
        work: Callable[[Store], Awaitable[Result]],
        *,
        undo: Callable[[Store], Awaitable[None]] | None = None,
    ) -> tuple[Store, Result]:
        """Does something in the shared store; in this process where there is none, or where it fails.

        A Redis that was paused does what it was sent once it wakes, when nobody waits any more: `undo` is for
        what would then stay.
        """
        if self._shared is not None:
            if self._clock() >= self._rests_until:
                try:
                    async with asyncio.timeout(BUDGET_S):
                        done = await work(self._shared)
                except Exception as error:
                    if undo is not None:
                        self._owe(undo)
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
                        self._pay()
                    self._is_down = False
                    return self._shared, done
            telemetry.count("hiprune.limits.fallbacks")
        return self._own, await work(self._own)

    async def undo(
        self, store: Store, work: Callable[[Store], Awaitable[None]], *, later: bool = False
    ) -> None:
        """Takes something back where it was done. In a Redis that fails it stays, until its time runs out.

        Or, with `later`, until it answers again.
        """
        try:
            async with asyncio.timeout(BUDGET_S):
                await work(store)
        except Exception as error:
            if later:
                self._owe(work)
            log.debug("not given back: %s", type(error).__name__)

    def _owe(self, work: Callable[[Store], Awaitable[None]]) -> None:
        """Keeps for later what Redis is to take back."""
        del self._owed[: -MAX_OWED + 1]
        self._owed.append(work)

    def _pay(self) -> None:
        """Has Redis take back, behind the request that found it well, what it could not before."""
        owed, self._owed = self._owed, []

        async def pay(store: Store) -> None:
            for each in owed:
                await self.undo(store, each)

        if owed and self._shared is not None:
            task = asyncio.create_task(pay(self._shared))
            self._paying.add(task)
            task.add_done_callback(self._paying.discard)


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
            store, entered = await self._quotas.do(
                lambda at: at.enter(key, most, self._ticket, lease_s),
                undo=lambda at: at.leave(key, self._ticket),
            )
            if not entered:
                raise self._refusal(
                    "concurrency", f"{most} requests are running, at most {most} may", BUSY_RETRY_S
                )
            self._place = store, key
        if limits.requests_per_minute is not None:
            try:
                self._request = await self._take("requests_per_minute", limits.requests_per_minute, 1)
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
        """Gives tokens back if nothing was generated.

        The request itself still counts, or clients could send for nothing what is refused, or leave before
        they are answered; unless it is the service's doing that there was no answer.
        """
        if not self._stays:
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

    async def _give_back(self, taken: _Taken) -> None:
        if time.monotonic() - taken.at_s < WINDOW_S:  # what is older has faded by itself
            await self._quotas.undo(taken.store, lambda at: at.give_back(taken.key, taken.limit, taken.cost))

    async def _leave(self) -> None:
        if self._place is not None:
            (store, key), self._place = self._place, None
            await self._quotas.undo(store, lambda at: at.leave(key, self._ticket), later=True)

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
