"""Single flight across pruners: of several that miss the same entry, one makes it and the others wait for it.

By a short claim in the store they share, renewed while the work goes on. It fails open: with no store to ask,
with one that does not answer, or with a leader that died, everybody does their own work. Knows no image.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from hiprune import telemetry
from services.pruner.stores import Claims

Result = TypeVar("Result")

CLAIM_S: Final = 3.0
"""How long a claim outlives its owner; renewed three times as often."""
FIRST_POLL_S: Final = 0.01
LAST_POLL_S: Final = 0.1


class Replicas:
    """This pruner among those that share a store; alone without `claims`."""

    def __init__(self, claims: Claims | None) -> None:
        self._claims = claims
        self._background: set[asyncio.Task[Any]] = set()

    async def once(
        self,
        key: bytes,
        *,
        find: Callable[[], Awaitable[Result | None]],
        make: Callable[[], Awaitable[tuple[Result, Awaitable[object]]]],
        wait_s: float,
    ) -> Result:
        """The entry that another pruner is making, found once it is there, or made here.

        `make` also gives what to wait for until others can find the entry. Others' work is waited for at most
        `wait_s`, and once: nobody queues behind a second leader. Raises what `make` and `find` raise.
        """
        claims = self._claims
        if claims is None:
            return (await make())[0]
        token = secrets.token_bytes(16)
        mine = await claims.claim(key, token, CLAIM_S)
        if mine is False:
            telemetry.count("hiprune.cache.joins", scope="replicas")
            await self._until_free(claims, key, wait_s)
            if (found := await find()) is not None:
                return found
            mine = await claims.claim(key, token, CLAIM_S)
        elif mine and (found := await find()) is not None:
            # made between this caller's miss and its claim
            self._spawn(claims.release(key, token))
            return found
        if not mine:
            return (await make())[0]
        return await self._lead(claims, key, token, make)

    async def close(self) -> None:
        """Gives up every claim."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _lead(
        self,
        claims: Claims,
        key: bytes,
        token: bytes,
        make: Callable[[], Awaitable[tuple[Result, Awaitable[object]]]],
    ) -> Result:
        """Makes the entry under a claim, which is given up once others can find it, or there will be none."""
        renewing = asyncio.create_task(_renew(claims, key, token))
        stored: Awaitable[object] | None = None
        try:
            result, stored = await make()
        finally:
            self._spawn(_give_up(claims, key, token, renewing, stored))
        return result

    async def _until_free(self, claims: Claims, key: bytes, wait_s: float) -> None:
        """Returns when nobody claims the key any more, the store does not say, or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(wait_s, 0)):
                pause_s = FIRST_POLL_S
                while await claims.is_claimed(key):
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LAST_POLL_S)

    def _spawn(self, work: Awaitable[object]) -> None:
        """Work that nobody waits for, and that must not stop when its request does."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _renew(claims: Claims, key: bytes, token: bytes) -> None:
    """Keeps a claim until cancelled, or until it is lost."""
    renewed: bool | None = True
    while renewed is not False:
        await asyncio.sleep(CLAIM_S / 3)
        renewed = await claims.renew(key, token, CLAIM_S)


async def _give_up(
    claims: Claims,
    key: bytes,
    token: bytes,
    renewing: asyncio.Task[None],
    stored: Awaitable[object] | None,
) -> None:
    """Waits until the entry can be found, then lets go."""
    if stored is not None:
        await asyncio.wait({asyncio.ensure_future(stored)})
    renewing.cancel()
    await claims.release(key, token)
