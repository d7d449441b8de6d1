"""A Redis by its URL: one server, behind TLS or a Unix socket, behind Sentinels, or a cluster.

    redis://[USER:PASSWORD@]HOST:PORT/DB             rediss:// for TLS, here and below
    unix://[USER:PASSWORD@]PATH?db=DB
    redis+sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT/SERVICE?db=DB
    redis+cluster://[USER:PASSWORD@]HOST:PORT,HOST:PORT

Behind `?` stands what Redis's own client takes in a URL, `ssl_ca_certs=FILE` for example; USER and PASSWORD
are the Redis's, the Sentinels' own are `sentinel_username` and `sentinel_password`. Knows no command.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias
from urllib.parse import unquote, urlsplit

from redis import asyncio as redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

RedisClient: TypeAlias = redis.Redis | RedisCluster

EXPECTED: Final = (
    "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// with options that Redis clients know"
)
_SENTINEL_PORT: Final = 26379
_REDIS_PORT: Final = 6379
_REDIRECTIONS: Final = 2
"""How often a cluster's answer that a key has moved is followed."""


def open_client(url: str, *, connect_timeout_s: float, max_connections: int) -> RedisClient:
    """A client that connects when first used; answers are bytes, and no operation has a timeout of its own.

    Raises ValueError or TypeError for a URL that is none. Either may hold parts of it, and so a password.
    """
    scheme, kind = _kind(url)
    common: dict[str, Any] = {
        "socket_timeout": None,
        "socket_connect_timeout": connect_timeout_s,
        "max_connections": max_connections,
        "protocol": 2,  # nothing of RESP3 is used, and its greeting costs a connection two round trips
    }
    once = Retry(NoBackoff(), 0)  # a retry would spend a budget twice
    if not kind:
        pool: Any = redis.ConnectionPool.from_url(url, **common, retry=once)
        pool.make_connection()  # connects nowhere; a wrong option in the URL shows here and not in a request
        return redis.Redis.from_pool(pool)
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    options: dict[str, Any] = {**common, **parse_url(f"{scheme}://{user}{at}host/?{parts.query}")}
    del options["host"]
    options["ssl"] = options.pop("connection_class", None) is not None
    if kind == "cluster":
        if parts.path.strip("/"):
            raise ValueError("a cluster has no databases to choose from")
        nodes = [ClusterNode(host, port) for host, port in _hosts(hosts, _REDIS_PORT)]
        return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), _REDIRECTIONS), **options)
    service = unquote(parts.path.strip("/"))
    if not service:
        raise ValueError("the name of the service is missing behind the Sentinels' addresses")
    own = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in options
    }
    sentinels: Any = Sentinel(  # type: ignore[no-untyped-call]
        _hosts(hosts, _SENTINEL_PORT),
        sentinel_kwargs={
            **{name: value for name, value in options.items() if name.startswith("ssl")},
            **common,
            **own,
            "retry": once,
        },
    )
    client: redis.Redis = sentinels.master_for(service, **options, retry=once)
    client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    return client


async def close_client(client: RedisClient) -> None:
    """Closes a client's connections, those to Sentinels too."""
    await client.aclose()
    if (pool := getattr(client, "connection_pool", None)) is not None:
        # also where a connection is in the middle of something: its task may have ended with its loop
        await pool.disconnect()
        if (sentinels := getattr(pool, "sentinel_manager", None)) is not None:
            await sentinels.aclose()


def is_wrong_type(error: ResponseError) -> bool:
    """Whether Redis is well, and a key holds something that none of ours would write there.

    Not so where it refuses for a reason of its own: its memory is full, it loads, it is a replica.
    """
    return any(said in str(error) for said in ("WRONGTYPE", "not an integer", "not a valid float"))


def _kind(url: str) -> tuple[str, str]:
    """`redis+sentinel` as ("redis", "sentinel"); the second is empty where nothing is added."""
    scheme, plus, kind = urlsplit(url).scheme.partition("+")
    if plus and (scheme not in ("redis", "rediss") or kind not in ("sentinel", "cluster")):
        raise ValueError(f"expected {EXPECTED}")
    return scheme, kind


def _hosts(text: str, default_port: int) -> list[tuple[str, int]]:
    """`a:1,[::1]:2` as pairs. Raises ValueError."""
    found = []
    for each in text.split(","):
        place = urlsplit(f"//{each}")
        if not place.hostname:
            raise ValueError("expected HOST:PORT, with commas between several")
        found.append((place.hostname, place.port or default_port))
    return found
