"""A service's door: who comes in, for which tenant, and what that is charged.

Brings together the decision (`hiprune.auth`), the tenants file and the limits. Knows no service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from hiprune import auth, deadlines, quotas
from hiprune.auth import ANONYMOUS_TENANT, Arrival, Caller, Rules
from hiprune.config import ServiceSettings
from hiprune.limit_stores import RedisStore
from hiprune.quotas import Charge, Quotas
from hiprune.tenants import TenantsWatch

log = logging.getLogger("hiprune.door")

LEASE_MARGIN_S: Final = 5.0
"""What a place among the requests at a time is held for beyond the deadline, should nobody give it back."""
_FREE: Final = ("Get",)
"""Methods that begin so say what a service is: they need a key as others do, and are charged nothing."""


class Door:
    """Lets requests in. One a process; without settings everybody, as an anonymous caller."""

    def __init__(
        self, rules: Rules | None = None, limits: Quotas | None = None, *, certified: bool = False
    ) -> None:
        """With `certified`, whoever comes by TLS has shown a certificate, or would not have come this far."""
        self._rules = rules or Rules()
        self._quotas = limits or Quotas()
        self._certified = certified
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, settings: ServiceSettings) -> Door:
        """The door that the settings describe. Raises ConfigError, for a tenants file that is broken too."""
        url = settings.limits_redis_url.get_secret_value()
        accounts = TenantsWatch(Path(settings.tenants)) if settings.tenants else None
        if accounts is not None and settings.allow_anonymous and accounts.named(ANONYMOUS_TENANT) is None:
            log.warning(
                "tenants, and allow_anonymous: who brings no key has no limits, as %s has no tenant %r",
                settings.tenants,
                ANONYMOUS_TENANT,
            )
        return cls(
            Rules(
                accounts=accounts,
                peer_token=settings.peer_token.get_secret_value(),
                allow_anonymous=settings.allow_anonymous,
                peers_only=settings.peers_only,
            ),
            Quotas(RedisStore(url) if url else None),
            certified=settings.tls_client_auth,
        )

    def open(self) -> None:
        """Begins to watch the tenants file."""
        if isinstance(self._rules.accounts, TenantsWatch):
            self._watching = asyncio.create_task(self._rules.accounts.watch())

    async def close(self) -> None:
        """Ends what `open` began, and hangs up."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        await self._quotas.close()

    @asynccontextmanager
    async def admit(self, context: Any, method: str) -> AsyncIterator[None]:
        """Around a request under its deadline: sets `auth.current()` and `quotas.current()`, and settles.

        Raises Unauthenticated, PermissionDenied, Exhausted (QUOTA).
        """
        arrival = Arrival(
            tuple(context.invocation_metadata() or ()),
            unix=auth.is_unix(context.peer()),
            certified=self._certified and b"ssl" in context.auth_context().get("transport_security_type", ()),
        )
        caller = auth.admit(arrival, self._rules)
        charge = await self._charge(caller, method)
        auth.enter(caller)
        quotas.enter(charge)
        try:
            yield
        except BaseException as error:
            await _settle(charge, error)
            raise
        charge.keep()
        await _settle(charge, None)

    async def _charge(self, caller: Caller, method: str) -> Charge:
        if not caller.first or method.rpartition("/")[2].startswith(_FREE):
            return Charge()
        return await self._quotas.open(caller.tenant, (deadlines.remaining_s() or 0) + LEASE_MARGIN_S)


async def _settle(charge: Charge, error: BaseException | None) -> None:
    """Settles, also for a client that leaves meanwhile: what it held is given back in any case."""
    settling = asyncio.create_task(charge.settle(error))
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.shield(settling)
    if not settling.done():
        await asyncio.wait({settling})
