"""What pruners share in Redis: large values in pieces, a bounded share for each owner, claims; every kind of
URL, against real servers."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from contextlib import ExitStack

import pytest
from redis import asyncio as redis

from hiprune import cache_keys
from hiprune.redis_clients import close_client, open_client
from services.pruner.redis_store import CHUNK_BYTES, RedisStore
from tests import redis_servers

BUDGET_S = 5
LARGE = 3 * CHUNK_BYTES + 12_345


def owner(name: str) -> bytes:
    return cache_keys.tenant_prefix(cache_keys.tenant_secret(b"secret", name))


def key_of(whose: bytes, name: object) -> bytes:
    return whose + b":e:%b" % str(name).encode()


@pytest.fixture
async def connect():
    """Opens Redis stores and closes them after the test."""
    stores = []

    def open_store(url: str, *, ttl_s: int = 60, timeout_s: float = BUDGET_S, **options: int) -> RedisStore:
        stores.append(RedisStore(url, ttl_s=ttl_s, timeout_s=timeout_s, **options))
        return stores[-1]

    yield open_store
    for store in stores:
        await store.close()


@pytest.fixture
async def inside(redis_server):
    """A plain client of the shared server."""
    async with redis.Redis.from_url(redis_server) as client:
        yield client


async def books(client, whose: bytes) -> tuple[int, dict[bytes, int]]:
    """What the owner is said to hold: the sum, and the size of each entry."""
    sizes = {key: int(size) for key, size in (await client.hgetall(whose + b":sizes")).items()}
    total = sizes.pop(b"", 0)
    assert set(sizes) == set(await client.zrange(whose + b":uses", 0, -1))
    assert total == sum(sizes.values())
    return total, sizes


# --- large values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, LARGE])
async def test_a_value_of_any_size_comes_back_as_it_was(connect, redis_server, inside, size):
    store, whose = connect(redis_server, ttl_s=600), owner(f"any size {size}")
    value = secrets.token_bytes(size)
    assert await store.put(key_of(whose, "k"), value, owner=whose)
    assert await store.get(key_of(whose, "k")) == value
    assert await books(inside, whose) == (size, {key_of(whose, "k"): size})
    assert 500 < await inside.ttl(key_of(whose, "k")) <= 600
    assert not [key async for key in inside.scan_iter(match=whose + b":t:*")]  # no parts are left


async def test_a_value_that_goes_while_it_is_read_is_no_value(connect, redis_server, inside):
    store, whose = connect(redis_server), owner("goes")
    key = key_of(whose, "k")
    assert await store.put(key, bytes(LARGE), owner=whose)
    plain = store._redis.execute_command

    async def execute(*command):
        answer = await plain(*command)
        await inside.delete(key)
        return answer

    store._redis.execute_command = execute
    assert await store.get(key) is None


async def test_what_was_read_is_deleted_unless_another_has_taken_its_place(connect, redis_server):
    store, whose = connect(redis_server), owner("replaced")
    key, old, new = key_of(whose, "k"), secrets.token_bytes(100), secrets.token_bytes(LARGE)
    assert await store.put(key, new, owner=whose)
    assert not await store.delete(key, old)
    assert await store.get(key) == new
    assert await store.delete(key, new)
    assert not await store.delete(key, new)


async def test_no_operation_moves_more_than_a_chunk(connect, redis_server, inside):
    """So that a budget for one operation is a budget for values of every size."""
    store, whose = connect(redis_server), owner("chunks")
    moved = []

    async def execute(*command, **options):
        answer = await plain(*command, **options)
        moved.append(
            (command[0], max(len(each) for each in (*command, answer or b"") if hasattr(each, "__len__")))
        )
        return answer

    client = store._redis
    plain, client.execute_command = client.execute_command, execute
    value = secrets.token_bytes(LARGE)
    assert await store.put(key_of(whose, "k"), value, owner=whose)
    assert await store.get(key_of(whose, "k")) == value
    assert max(size for _, size in moved) == CHUNK_BYTES
    assert [name for name, _ in moved] == ["SET", *["APPEND"] * 3, "EVAL", *["GETRANGE"] * 4]
    moved.clear()
    assert await store.put(key_of(whose, "small"), bytes(400_000), owner=whose)
    assert await store.get(key_of(whose, "small")) == bytes(400_000)
    assert [name for name, _ in moved] == ["EVAL", "GETRANGE"]  # one round trip each


async def test_tens_of_megabytes_are_stored_and_read_within_a_short_budget_for_each_operation(
    connect, redis_server
):
    store, whose = connect(redis_server, timeout_s=0.5), owner("tens")
    value = secrets.token_bytes(2**20) * 66
    assert await store.put(key_of(whose, "k"), value, owner=whose)
    assert await store.get(key_of(whose, "k")) == value
    await store.delete(key_of(whose, "k"))


async def test_a_redis_that_stops_in_the_middle_of_a_value_is_a_miss_within_the_budget(connect, start_redis):
    url, process = start_redis()
    store, whose = connect(url, timeout_s=0.2), owner("middle")
    assert await store.put(key_of(whose, "k"), bytes(LARGE), owner=whose)
    plain = store._redis.execute_command

    async def stop_after_one(*command, **options):
        answer = await plain(*command, **options)
        store._redis.execute_command = plain
        process.send_signal(signal.SIGSTOP)
        return answer

    store._redis.execute_command = stop_after_one
    begun = time.monotonic()
    assert await store.get(key_of(whose, "k")) is None
    assert time.monotonic() - begun < 2  # one budget, and not one for each chunk
    process.send_signal(signal.SIGCONT)
    assert await store.get(key_of(whose, "k")) == bytes(LARGE)


async def test_a_value_larger_than_any_that_is_stored_is_not_read_to_its_end(connect, redis_server, inside):
    store, whose = connect(redis_server, max_value_bytes=CHUNK_BYTES), owner("planted")
    await inside.set(key_of(whose, "k"), bytes(20 * CHUNK_BYTES))
    before = (await inside.info("stats"))["total_net_output_bytes"]
    assert await store.get(key_of(whose, "k")) is None
    assert (await inside.info("stats"))["total_net_output_bytes"] - before < 3 * CHUNK_BYTES
    assert not await store.put(key_of(whose, "k"), bytes(CHUNK_BYTES + 1), owner=whose)
    await inside.delete(key_of(whose, "k"))


async def test_reads_find_a_connection_while_many_large_values_are_being_stored(connect, redis_server):
    store, whose = connect(redis_server), owner("busy")
    assert await store.put(key_of(whose, "small"), b"small", owner=whose)
    plain, go_on = store._redis.execute_command, asyncio.Event()

    async def slow_writes(*command, **options):
        if command[0] == "APPEND":
            await go_on.wait()
        return await plain(*command, **options)

    store._redis.execute_command = slow_writes
    puts = [
        asyncio.create_task(store.put(key_of(whose, number), bytes(LARGE), owner=whose))
        for number in range(2 * store.MAX_CONNECTIONS)
    ]
    for _ in range(5):
        assert await store.get(key_of(whose, "small")) == b"small"
    go_on.set()
    assert any(await asyncio.gather(*puts))


# --- shares ---------------------------------------------------------------------------------------


async def test_an_owner_holds_no_more_than_a_share_and_nobody_else_pays_for_it(connect, redis_server, inside):
    store = connect(redis_server, share_bytes=1000)
    alice, bob = owner("share of alice"), owner("share of bob")
    assert await store.put(key_of(alice, "hers"), bytes(900), owner=alice)
    for number in range(20):
        assert await store.put(key_of(bob, number), bytes(300), owner=bob)
    total, held = await books(inside, bob)
    assert total == 900
    assert sorted(held) == sorted(key_of(bob, number) for number in (17, 18, 19))
    assert [await store.get(key_of(bob, number)) is not None for number in range(20)] == [False] * 17 + [
        True
    ] * 3
    assert await store.get(key_of(alice, "hers")) == bytes(900)
    assert not await store.put(key_of(bob, "large"), bytes(1001), owner=bob)
    assert (await books(inside, bob))[0] == 900
    assert await store.put(key_of(bob, "all"), bytes(1000), owner=bob)
    assert await books(inside, bob) == (1000, {key_of(bob, "all"): 1000})


async def test_a_large_value_makes_room_like_a_small_one(connect, redis_server, inside):
    store, whose = connect(redis_server, share_bytes=2 * LARGE), owner("large share")
    for number in range(4):
        assert await store.put(key_of(whose, number), bytes(LARGE), owner=whose)
    assert await books(inside, whose) == (
        2 * LARGE,
        dict.fromkeys((key_of(whose, 2), key_of(whose, 3)), LARGE),
    )
    await inside.delete(key_of(whose, 2), key_of(whose, 3))


async def test_an_entry_that_is_replaced_is_counted_once(connect, redis_server, inside):
    store, whose = connect(redis_server, share_bytes=1000), owner("replaced")
    for size in (100, 300, 200):
        assert await store.put(key_of(whose, "k"), bytes(size), owner=whose)
    assert await books(inside, whose) == (200, {key_of(whose, "k"): 200})


async def test_what_was_read_lately_stays_though_reads_write_no_books(connect, redis_server, inside):
    store, whose = connect(redis_server, share_bytes=300), owner("lately")
    for name in "abc":
        assert await store.put(key_of(whose, name), bytes(100), owner=whose)
    now = int((await inside.time())[0])
    for number, name in enumerate("abc"):  # put in this order, long ago
        await inside.zadd(whose + b":uses", {key_of(whose, name): now - 1000 + number})
    for name, idle in (("a", 1), ("b", 500), ("c", 900)):  # and read since: a lately, c hardly
        value = await inside.dump(key_of(whose, name))
        await inside.restore(key_of(whose, name), 60_000, value, replace=True, idletime=idle)
    assert await store.put(key_of(whose, "d"), bytes(100), owner=whose)
    assert set((await books(inside, whose))[1]) == {key_of(whose, name) for name in "abd"}
    assert await store.put(key_of(whose, "e"), bytes(100), owner=whose)
    assert set((await books(inside, whose))[1]) == {key_of(whose, name) for name in "ade"}


async def test_entries_that_went_by_themselves_give_their_room_back(connect, redis_server, inside):
    """Expired, evicted or deleted: the books notice when the room is needed, and so never drift for long."""
    store, whose = connect(redis_server, share_bytes=1000), owner("went")
    for number in range(10):
        assert await store.put(key_of(whose, number), bytes(100), owner=whose)
    await inside.delete(*(key_of(whose, number) for number in range(9)))
    assert await store.put(key_of(whose, "new"), bytes(900), owner=whose)
    assert await books(inside, whose) == (1000, {key_of(whose, 9): 100, key_of(whose, "new"): 900})


@pytest.mark.parametrize("half", [b":uses", b":sizes"])
async def test_books_that_were_evicted_begin_anew_and_are_right_again(connect, redis_server, inside, half):
    store, whose = connect(redis_server, share_bytes=1000), owner(f"evicted {half!r}")
    for number in range(10):
        assert await store.put(key_of(whose, number), bytes(100), owner=whose)
    await inside.delete(whose + half)
    for number in range(30):
        assert await store.put(key_of(whose, number), bytes(100), owner=whose)
        total, held = await books(inside, whose)
        assert total <= 1000
    assert set(held) == {key_of(whose, number) for number in range(20, 30)}
    assert len([key async for key in inside.scan_iter(match=whose + b":e:*")]) == 10


@pytest.mark.parametrize("half", [b":uses", b":sizes"])
async def test_books_that_somebody_wrote_over_begin_anew_and_are_right_again(
    connect, redis_server, inside, half
):
    store, whose = connect(redis_server, share_bytes=1000), owner(f"rubbish {half!r}")
    assert await store.put(key_of(whose, 0), bytes(100), owner=whose)
    await inside.set(whose + half, b"rubbish")
    assert await store.put(key_of(whose, 1), bytes(100), owner=whose)
    assert await books(inside, whose) == (100, {key_of(whose, 1): 100})


async def test_what_is_no_value_is_a_miss_goes_and_says_nothing_against_redis(connect, redis_server, inside):
    store, whose = connect(redis_server), owner("no value")
    assert await store.put(key_of(whose, "good"), b"v", owner=whose)
    for number in range(2 * RedisStore.FAILURES_TO_OPEN):
        await inside.rpush(key_of(whose, number), b"rubbish")
    for number in range(2 * RedisStore.FAILURES_TO_OPEN):
        assert await store.get(key_of(whose, number)) is None
        assert not await inside.exists(key_of(whose, number))
    assert await store.get(key_of(whose, "good")) == b"v"


async def test_books_end_with_the_last_entry(connect, redis_server, inside):
    store, whose = connect(redis_server, ttl_s=50), owner("end")
    assert await store.put(key_of(whose, "k"), b"v", owner=whose)
    for key in (key_of(whose, "k"), whose + b":uses", whose + b":sizes"):
        assert 0 < await inside.ttl(key) <= 50


async def test_shares_are_kept_where_redis_counts_uses_and_not_times(connect, start_redis):
    url, _ = start_redis("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lfu")
    store, whose = connect(url, share_bytes=300), owner("lfu")
    for number in range(10):
        assert await store.put(key_of(whose, number), bytes(100), owner=whose)
    kept = [number for number in range(10) if await store.get(key_of(whose, number)) is not None]
    assert kept == [7, 8, 9]


# --- claims ---------------------------------------------------------------------------------------


async def test_a_claim_is_one_holders_until_it_is_given_up_or_forgotten(connect, redis_server, inside):
    one, other = connect(redis_server), connect(redis_server)
    key = owner("claims") + b":l:x"
    assert await one.is_claimed(key) is False
    assert await one.claim(key, b"one", 20) is True
    assert await other.claim(key, b"other", 20) is False
    assert await other.is_claimed(key) is True
    assert 0 < await inside.pttl(key) <= 20_000
    await other.release(key, b"other")  # not the other's to give up
    assert await other.renew(key, b"other", 90) is False
    assert await one.renew(key, b"one", 90) is True
    assert 20_000 < await inside.pttl(key) <= 90_000
    await one.release(key, b"one")
    assert await other.claim(key, b"other", 20) is True
    assert await one.renew(key, b"one", 20) is False
    await other.release(key, b"other")


async def test_a_claim_that_never_runs_out_is_nobodys(connect, redis_server, inside):
    store, key = connect(redis_server), b"hiprune:v1:rubbish:l:1"
    await inside.set(key, b"rubbish")
    assert await store.claim(key, b"token", 10) is False
    assert await store.is_claimed(key) is False
    assert await store.claim(key, b"token", 10) is True


async def test_a_redis_that_is_gone_says_nothing_of_claims(connect, tmp_path):
    store = connect(f"unix://{tmp_path}/nobody.sock")
    assert await store.claim(b"k", b"t", 1) is None
    assert await store.renew(b"k", b"t", 1) is None
    assert await store.is_claimed(b"k") is None
    await store.release(b"k", b"t")


# --- every kind of URL ----------------------------------------------------------------------------


async def works(store: RedisStore, name: str) -> bool:
    """Whether small and large values, books, claims and deleting all work."""
    whose = owner(name)
    for size in (100, LARGE):
        if not await store.put(key_of(whose, size), bytes(size), owner=whose):
            return False
        assert await store.get(key_of(whose, size)) == bytes(size)
        await store.delete(key_of(whose, size))
        assert await store.get(key_of(whose, size)) is None
    assert await store.claim(whose + b":l:x", b"token", 5)
    assert await store.renew(whose + b":l:x", b"token", 5)
    await store.release(whose + b":l:x", b"token")
    assert await store.is_claimed(whose + b":l:x") is False
    return True


async def test_tls_is_spoken_where_the_url_says_so_and_the_server_proves_who_it_is(
    connect, redis_server, tmp_path
):
    pem, key = redis_servers.certificate(tmp_path)
    other, _ = redis_servers.certificate(tmp_path, "other")
    async with redis_servers.behind_tls(redis_server.removeprefix("unix://"), pem, key) as port:
        assert await works(connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={pem}"), "tls")
        assert not await works(connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={other}"), "tls")
        assert not await works(connect(f"rediss://127.0.0.1:{port}/0"), "tls")
        assert not await works(connect(f"redis://127.0.0.1:{port}/0"), "tls")


ACL = (
    "on >sesame ~hiprune:v1:* +get +getrange +set +append +unlink +pttl +type +eval +rename +expire +pexpire "
    "+del +hget +hset +hdel +hlen +hincrby +zadd +zrange +zrem +zcard +time +object"
)


async def test_an_acl_user_with_the_documented_rights_is_enough(connect, start_redis):
    url, _ = start_redis()
    async with redis.Redis.from_url(url) as admin:
        await admin.execute_command("ACL", "SETUSER", "pruner", *ACL.split())
        await admin.execute_command("ACL", "SETUSER", "default", "off")
        path = url.removeprefix("unix://")
        assert await works(connect(f"unix://pruner:sesame@{path}"), "acl")
        assert not await works(connect(f"unix://pruner:wrong@{path}"), "acl")
        assert not await works(connect(url), "acl")


async def test_a_cluster_keeps_what_one_tenant_holds_on_one_node(connect, tmp_path):
    with redis_servers.cluster(tmp_path) as ports:
        url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{ports[0]}"  # nobody is at the first
        store = connect(url, share_bytes=2 * LARGE)
        names = [f"tenant {number}" for number in range(6)]
        for name in names:
            assert await works(store, name)
            assert await store.put(key_of(owner(name), "k"), name.encode(), owner=owner(name))
        assert [await store.get(key_of(owner(name), "k")) for name in names] == [
            each.encode() for each in names
        ]
        spread = []
        for port in ports:
            async with redis.Redis(port=port) as node:
                spread.append({key.partition(b"}")[0] for key in await node.keys()})
        assert sum(len(each) for each in spread) == len(names)
        assert sum(bool(each) for each in spread) > 1
        found = await asyncio.gather(*(store.get(key_of(owner(name), "k")) for name in names * 20))
        assert found == [each.encode() for each in names * 20]


async def test_a_late_answer_of_a_cluster_reaches_nobody_else(connect, tmp_path, monkeypatch):
    monkeypatch.setattr(RedisStore, "OPEN_S", 0.2)
    with ExitStack() as stack:
        (port,) = stack.enter_context(redis_servers.cluster(tmp_path, nodes=1))
        store, whose = connect(f"redis+cluster://127.0.0.1:{port}", timeout_s=0.3), owner("late")
        for number in range(8):
            assert await store.put(key_of(whose, number), b"value %d" % number, owner=whose)
        monkeypatch.setattr(RedisStore, "OVERDUE_S", 0.0)  # given up at once, in the middle of an answer
        async with redis.Redis(port=port) as node:
            await node.execute_command("CLIENT", "PAUSE", 500)
            found = await asyncio.gather(*(store.get(key_of(whose, number)) for number in range(4)))
            assert found == [None] * 4
        await asyncio.sleep(0.5)  # until the pause and the breaker's are over
        assert await store.get(key_of(whose, 7)) == b"value 7"
        found = await asyncio.gather(*(store.get(key_of(whose, number)) for number in reversed(range(8))))
        assert found == [b"value %d" % number for number in reversed(range(8))]


async def test_sentinels_say_who_the_master_is(connect, tmp_path):
    with redis_servers.watched(tmp_path, "cache", replicas=0) as (sentinel, _):
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel}/cache?db=2"  # nobody is at the first
        assert await works(connect(url), "sentinel")
        assert not await works(connect(url.replace("/cache", "/other")), "sentinel")


@pytest.mark.extra
async def test_a_failover_costs_misses_alone(connect, tmp_path, monkeypatch):
    monkeypatch.setattr(RedisStore, "OPEN_S", 0.1)
    with redis_servers.watched(tmp_path, "cache", replicas=1) as (sentinel, running):
        store = connect(f"redis+sentinel://127.0.0.1:{sentinel}/cache", timeout_s=1)
        whose = owner("failover")
        assert await store.put(key_of(whose, "k"), b"before", owner=whose)
        running[0].kill()
        running[0].wait()
        assert await store.get(key_of(whose, "k")) is None
        deadline = time.monotonic() + 60
        while not await store.put(key_of(whose, "k"), b"after", owner=whose):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert await store.get(key_of(whose, "k")) == b"after"


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://host:1",
        "redis+sentinel://host:1/?db=1",
        "redis+sentinel:///service",
        "redis+sentinel://host:port/service",
        "redis+sentinel://host:1/service?what=1",
        "redis+cluster://",
        "redis+cluster://a,,b",
        "redis+cluster://host/3",
        "redis+cluster://host?what=1",
        "redis+other://host",
        "http+cluster://host",
    ],
)
def test_a_url_that_is_none_is_refused_at_once(url):
    with pytest.raises((ValueError, TypeError)):
        open_client(url, connect_timeout_s=1, max_connections=1)


async def test_the_parts_of_a_url_reach_where_they_belong():
    url = "rediss+sentinel://us%40er:pa%3Ass@a:1,[::1]/svc?db=3&ssl_ca_certs=x&sentinel_password=guard"
    client = open_client(url, connect_timeout_s=1, max_connections=7)
    pool = client.connection_pool
    kwargs = pool.connection_kwargs
    assert (kwargs["username"], kwargs["password"], kwargs["db"]) == ("us@er", "pa:ss", 3)
    assert (pool.service_name, pool.max_connections) == ("svc", 7)
    addresses = []
    for sentinel in pool.sentinel_manager.sentinels:
        own = sentinel.connection_pool.connection_kwargs
        addresses.append((own["host"], own["port"]))
        assert own["password"] == "guard"
        assert own.get("username") is None
        assert own["ssl_ca_certs"] == "x"
    assert addresses == [("a", 1), ("::1", 26379)]
    await close_client(client)
