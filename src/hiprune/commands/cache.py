"""`hiprune cache`: what tenants hold in the cache that pruners share in Redis, and forgetting it.

Reads and removes what lies under a tenant's prefix, which it derives from the cache secret as the pruners do.
Prints no key and no secret. What a pruner caches in its own process ends with the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hiprune.commands import options
from hiprune.commands.options import AsJson, err, out

if TYPE_CHECKING:
    from hiprune.redis_clients import RedisClient

_BATCH: Final = 500
_TIMEOUT_S: Final = 10.0
_MIN_SECRET: Final = 16

app = typer.Typer(
    no_args_is_help=True,
    help="Counts and forgets cached images in the Redis that pruners share. A cache in a pruner's own "
    "process ends with the process.",
)

RedisUrl = Annotated[
    str,
    typer.Option(envvar="HIPRUNE_PRUNER_REDIS_URL", help="the pruners' redis_url; better in the variable"),
]
Secret = Annotated[
    str,
    typer.Option(
        envvar="HIPRUNE_PRUNER_CACHE_SECRET",
        show_default=False,
        help="the pruners' cache_secret; better in the variable",
    ),
]


@dataclass(slots=True)
class Tally:
    """Entries and bytes by level."""

    entries: dict[str, int] = field(default_factory=lambda: {"encoded": 0, "pruned": 0})
    size: dict[str, int] = field(default_factory=lambda: {"encoded": 0, "pruned": 0})
    prefixes: set[bytes] = field(default_factory=set)

    def add(self, level: str, prefix: bytes, size: int) -> None:
        """Counts one entry of a tenant's."""
        self.entries[level] += 1
        self.size[level] += size
        self.prefixes.add(prefix)

    @property
    def total(self) -> int:
        """Entries of both levels."""
        return sum(self.entries.values())

    def content(self) -> dict[str, Any]:
        """As JSON."""
        levels = {name: {"entries": self.entries[name], "bytes": self.size[name]} for name in self.entries}
        return {**levels, "entries": self.total, "bytes": sum(self.size.values())}

    def words(self) -> str:
        """As a person reads it."""
        parts = [f"{count} {name}" for name, count in self.entries.items()]
        return f"{', '.join(parts)}, {sum(self.size.values()) / 2**20:.1f} MiB"


@app.command()
def stats(
    tenant: Annotated[str | None, typer.Option(help="its name; none: all tenants together")] = None,
    redis_url: RedisUrl = "redis://127.0.0.1:6379/0",
    cache_secret: Secret = "",
    as_json: AsJson = False,
) -> None:
    """Counts the entries and bytes of one tenant, or of all."""
    tally = _run(redis_url, _prefix_of(tenant, cache_secret), remove=False, quiet=as_json)
    if as_json:
        who = {"tenants": len(tally.prefixes)} if tenant is None else {"tenant": tenant}
        options.print_json({**who, **tally.content()})
    else:
        who_says = f"{len(tally.prefixes)} tenants" if tenant is None else tenant
        out.print(f"{who_says}: {tally.words()}", markup=False, highlight=False)
        _explain_nothing(tenant, tally)


@app.command()
def purge(
    tenant: Annotated[str, typer.Option(help="its name")],
    redis_url: RedisUrl = "redis://127.0.0.1:6379/0",
    cache_secret: Secret = "",
    as_json: AsJson = False,
) -> None:
    """Forgets all that one tenant has in the cache. What a pruner is writing meanwhile may stay."""
    tally = _run(redis_url, _prefix_of(tenant, cache_secret), remove=True, quiet=as_json)
    if as_json:
        options.print_json({"tenant": tenant, "purged": tally.content()})
    else:
        out.print(f"{tenant}: forgot {tally.words()}", markup=False, highlight=False)
        _explain_nothing(tenant, tally)


def _explain_nothing(tenant: str | None, tally: Tally) -> None:
    """A wrong secret and a wrong name look like an empty cache."""
    if tenant is not None and not tally.total:
        err.print("[dim]nothing under this name and secret: check both if that surprises you[/dim]")


def _prefix_of(tenant: str | None, cache_secret: str) -> bytes:
    """What every key of the tenant begins with, or of all tenants. Raises BadParameter."""
    try:
        from hiprune import cache_keys
    except ImportError as error:
        raise typer.BadParameter("needs what a pruner needs: pip install 'hiprune[pruner]'") from error

    if tenant is None:
        return cache_keys.NAMESPACE
    if len(cache_secret) < _MIN_SECRET:
        raise typer.BadParameter(
            f"{len(cache_secret)} characters, expected the pruners' own, at least {_MIN_SECRET} "
            "(HIPRUNE_PRUNER_CACHE_SECRET)",
            param_hint="--cache-secret",
        )
    return cache_keys.tenant_prefix(cache_keys.tenant_secret(cache_secret.encode(), tenant))


def _run(redis_url: str, prefix: bytes, *, remove: bool, quiet: bool) -> Tally:
    """Walks over the keys; trouble is one line and exit code 1, without the URL: it may hold a password."""
    from redis.exceptions import RedisClusterException, RedisError

    word = "forgotten" if remove else "counted"
    try:
        with err.status("looking") as status:

            def show(count: int) -> None:
                if not quiet:
                    status.update(f"{count} entries {word}")

            return asyncio.run(_walk(redis_url, prefix, remove=remove, progress=show))
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        said = f"Redis: {str(error) or type(error).__name__}"
        if quiet:
            options.print_error(said, reason="REDIS_UNREACHABLE")
        else:
            err.print(f"error: {said}", style="red", markup=False)
        raise typer.Exit(1) from None


async def _walk(redis_url: str, prefix: bytes, *, remove: bool, progress: Callable[[int], None]) -> Tally:
    """Counts what lies under a prefix, and removes it, a batch at a time."""
    tally = Tally()
    seen: set[bytes] = set()  # a scan may meet a key twice
    async with _client(redis_url) as client:
        batch: list[bytes] = []
        async for key in client.scan_iter(match=prefix + b":*", count=_BATCH):
            if key not in seen:
                seen.add(key)
                batch.append(key)
            if len(batch) >= _BATCH:
                await _take(client, batch, tally, remove=remove)
                progress(tally.total)
                batch.clear()
        await _take(client, batch, tally, remove=remove)
    return tally


async def _take(client: RedisClient, keys: list[bytes], tally: Tally, *, remove: bool) -> None:
    """Counts the entries among the keys, and removes all of the keys."""
    from hiprune import cache_keys

    entries = []
    for key in keys:
        prefix, _, rest = key.rpartition(b"}:")
        level = cache_keys.LEVELS.get(rest.partition(b":")[0])
        if level is not None:
            entries.append((level, prefix, key))
    async with asyncio.timeout(_TIMEOUT_S):
        pipeline: Any = client.pipeline(transaction=False)
        for _, _, key in entries:
            pipeline.strlen(key)
        sizes = await pipeline.execute() if entries else []
        if remove and keys:
            await client.unlink(*keys)  # one tenant's, and so of one slot
    for (level, prefix, _), size in zip(entries, sizes, strict=True):
        if size:  # it may have gone meanwhile
            tally.add(level, prefix, size)


@asynccontextmanager
async def _client(redis_url: str) -> AsyncIterator[RedisClient]:
    """A client of the URL, closed in the end. Raises BadParameter for a URL that is none."""
    from hiprune.redis_clients import EXPECTED, close_client, open_client

    try:
        client = open_client(redis_url, connect_timeout_s=_TIMEOUT_S, max_connections=4)
    except (ValueError, TypeError):
        raise typer.BadParameter(f"expected {EXPECTED}", param_hint="--redis-url") from None
    try:
        yield client
    finally:
        await close_client(client)
