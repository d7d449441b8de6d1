"""The cache: tenants never share, what was put is found, and what is damaged or too large is a miss."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
import re
import signal
from collections import Counter

import pytest
import torch

from hiprune import telemetry, tensors
from hiprune.errors import InvalidInput
from hiprune.v1 import encoder_service_pb2, media_pb2, pruner_service_pb2, tensor_pb2
from services.pruner import records
from services.pruner.cache import ModelIdentity, TenantKeys, TokenCache, media_digest
from services.pruner.flight import SingleFlight
from services.pruner.policy import Policy, resolve_layers
from services.pruner.redis_store import RedisStore
from services.pruner.stores import MemoryStore, NoStore

SECRET = b"a secret that the pruners share"
MODEL = ModelIdentity("vision", "preprocessing", "paired", 576)
DIGEST = bytes(range(32))
Encoded = encoder_service_pb2.EncodeImageResponse
Video = media_pb2.Video


def policy(method: int = pruner_service_pb2.METHOD_HIPRUNE, **fields) -> Policy:
    message = pruner_service_pb2.PrunePolicy(method=method, **fields)
    return resolve_layers(message, object_layer=9, deep_layer=23)


PLAIN = policy()
PLUS_PLUS = policy(pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS)


def image(name: str = "llava", size: int = 12) -> Encoded:
    features = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F16, shape=[1, size // 2], data=bytes(size))
    view = encoder_service_pb2.View(features=features, grid_height=1, grid_width=1)
    return Encoded(views=[view], fingerprint=encoder_service_pb2.ModelFingerprint(family=name))


@pytest.fixture(params=["memory", "redis"])
async def cache(request, redis_server):
    """The cache over either store."""
    store = MemoryStore(10_000_000, 60)
    if request.param == "redis":
        store = RedisStore(redis_server, ttl_s=60, timeout_s=5)
    made = TokenCache(store, secret=SECRET, model=MODEL, max_value_bytes=1_000_000)
    yield made
    await made.close()


class SlowStore(MemoryStore):
    """A store whose puts wait until they are let through, the later ones first."""

    def __init__(self) -> None:
        super().__init__(10_000_000, 60)
        self.gate = asyncio.Event()
        self.begun = 0

    async def put(self, key: bytes, value: bytes, *, owner: bytes) -> bool:
        self.begun += 1
        turn = self.begun
        await self.gate.wait()
        await asyncio.sleep(0.1 / turn)
        return await super().put(key, value, owner=owner)


def over(store) -> TokenCache:
    return TokenCache(store, secret=SECRET, model=MODEL, max_value_bytes=1_000_000)


# --- there and back -------------------------------------------------------------------------------


async def test_what_was_put_is_found_in_both_levels(cache):
    keys = cache.keys("found")
    assert await cache.get_encoded(keys, DIGEST) is None
    await cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) == image()
    media = pruner_service_pb2.PrunedMedia(vision_digest="v")
    assert await cache.get_pruned(keys, DIGEST, PLAIN, "") is None
    cache.put_pruned(keys, DIGEST, PLAIN, "", media)
    assert await cache.get_pruned(keys, DIGEST, PLAIN, "") == media
    assert await cache.get_encoded(keys, bytes(32)) is None


async def test_a_large_value_comes_back_as_it_was(cache):
    keys = cache.keys("large")
    await cache.put_encoded(keys, DIGEST, image(size=900_000))
    assert await cache.get_encoded(keys, DIGEST) == image(size=900_000)


async def test_a_request_reads_what_this_process_is_just_writing_and_does_not_wait_for_the_store():
    store = SlowStore()
    cache = over(store)
    keys = cache.keys("t")
    cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) == image()
    assert not store.gate.is_set()
    assert await store.get(keys.encoded(DIGEST)) is None
    store.gate.set()
    await cache.close()


async def test_of_two_puts_of_one_key_the_last_stays():
    store = SlowStore()
    cache = over(store)
    keys = cache.keys("t")
    puts = [cache.put_encoded(keys, DIGEST, image(name)) for name in ("first", "second", "third")]
    assert (await cache.get_encoded(keys, DIGEST)).fingerprint.family == "third"
    store.gate.set()
    await asyncio.gather(*puts)
    assert (await cache.get_encoded(keys, DIGEST)).fingerprint.family == "third"


async def test_closing_finishes_every_put():
    store = SlowStore()
    cache = over(store)
    puts = []
    store_put = store.put

    async def put(key, value, *, owner):
        puts.append(value)
        return await store_put(key, value, owner=owner)

    store.put = put
    keys = cache.keys("t")
    for number in range(4):
        cache.put_encoded(keys, DIGEST if number % 2 else bytes(32), image(str(number)))
    asyncio.get_running_loop().call_later(0.02, store.gate.set)
    await cache.close()
    assert len(puts) == 4


async def test_a_reader_that_leaves_does_not_stop_the_write():
    store = SlowStore()
    cache = over(store)
    keys = cache.keys("t")
    stored = cache.put_encoded(keys, DIGEST, image())
    reading = asyncio.create_task(cache.get_encoded(keys, DIGEST))
    await asyncio.sleep(0)
    reading.cancel()
    store.gate.set()
    await stored
    assert await store.get(keys.encoded(DIGEST)) is not None


# --- what is not kept -----------------------------------------------------------------------------


async def test_what_is_too_large_is_not_cached(cache):
    keys = cache.keys("too large")
    cache.put_encoded(keys, DIGEST, image(size=1_000_001))
    assert await cache.get_encoded(keys, DIGEST) is None


async def test_more_writes_than_can_wait_are_not_cached():
    store = SlowStore()
    cache = over(store)
    keys = cache.keys("t")
    for number in range(200):
        cache.put_encoded(keys, number.to_bytes(32, "little"), image())
    assert cache.pending == 64
    store.gate.set()
    found = [await cache.get_encoded(keys, number.to_bytes(32, "little")) for number in range(200)]
    assert [each is not None for each in found] == [True] * 64 + [False] * 136
    await cache.close()


async def test_more_bytes_than_can_wait_are_not_cached_and_make_room_again():
    store = SlowStore()
    cache = over(store)
    keys = cache.keys("t")
    puts = [
        cache.put_encoded(keys, number.to_bytes(32, "little"), image(size=600_000)) for number in range(10)
    ]
    assert cache.pending == 3  # two values' worth of a million bytes
    store.gate.set()
    await asyncio.gather(*puts)
    await cache.put_encoded(keys, DIGEST, image(size=600_000))
    assert await cache.get_encoded(keys, DIGEST) == image(size=600_000)


async def test_a_put_that_fails_is_a_miss_and_holds_nothing_up(caplog):
    store = MemoryStore(10_000_000, 60)
    cache = over(store)
    keys = cache.keys("t")
    elsewhere = image()
    elsewhere.views[0].features.shared_memory.segment = "of a call that is over"
    with pytest.raises(InvalidInput):
        await cache.put_encoded(keys, DIGEST, elsewhere)
    assert "could not be stored" in caplog.text
    assert await cache.get_encoded(keys, DIGEST) is None
    assert cache.pending == 0
    await cache.close()


# --- what is counted ------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Every count as (name, labels…), and what it adds up to."""
    found: Counter[tuple[str, ...]] = Counter()

    def count(name: str, amount: int = 1, **labels: str) -> None:
        assert name in telemetry.COUNTERS
        found[name.removeprefix("hiprune.cache."), *labels.values()] += amount

    monkeypatch.setattr(telemetry, "count", count)
    return found


async def test_lookups_are_counted_by_level_and_outcome_and_bytes_as_they_are_stored(cache, counted):
    keys = cache.keys("counted")
    assert await cache.get_pruned(keys, DIGEST, PLAIN, "") is None
    assert await cache.get_encoded(keys, DIGEST) is None
    assert await cache.get_encoded(keys, DIGEST, again=True) is None  # the same miss
    await cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) is not None
    assert await cache.get_encoded(keys, DIGEST, again=True) is not None
    key = keys.encoded(DIGEST)
    size = len(await cache.store.get(key))
    assert await cache.store.put(key, b"damaged", owner=keys.prefix)
    assert await cache.get_encoded(keys, DIGEST) is None
    assert counted == {
        ("lookups", "pruned", "miss"): 1,
        ("lookups", "encoded", "miss"): 1,
        ("lookups", "encoded", "hit"): 2,
        ("lookups", "encoded", "damaged"): 1,
        ("stored", "encoded"): size,
    }


async def test_a_redis_in_trouble_is_counted_and_its_breaker_told(start_redis, counted, monkeypatch):
    told = []
    monkeypatch.setattr(telemetry, "measure", lambda name, value: told.append((name, value)))
    monkeypatch.setattr(RedisStore, "OPEN_S", 0.0)
    url, process = start_redis()
    store = RedisStore(url, ttl_s=60, timeout_s=0.05)
    process.send_signal(signal.SIGSTOP)
    for _ in range(4):
        assert await store.get(b"k") is None
    assert counted == {("failures", "get"): 4}
    process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(20):
        while not await store.put(b"k", b"v", owner=b"o"):
            pass
    assert told == [("hiprune.cache.breaker", state) for state in (0, 1, 0)]
    await store.close()


async def test_who_joins_a_flight_is_counted(counted):
    flights: SingleFlight = SingleFlight()
    await asyncio.gather(*(flights.run("k", lambda: asyncio.sleep(0)) for _ in range(3)))
    assert counted == {("joins", "process"): 2}


# --- numbers and types ----------------------------------------------------------------------------


def scored(*scores: float, dtype: int = tensor_pb2.DATA_TYPE_F16) -> Encoded:
    made = image()
    made.views[0].features.dtype = dtype
    entry = made.views[0].attention.add(layer=9)
    entry.scores.CopyFrom(tensors.to_proto(torch.tensor(scores)))
    return made


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
async def test_scores_and_tokens_that_are_no_numbers_are_never_cached(wrong, cache):
    keys = cache.keys(f"not cached {wrong}")
    await cache.put_encoded(keys, DIGEST, scored(0.5, wrong))
    assert await cache.get_encoded(keys, DIGEST) is None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        media = pruner_service_pb2.PrunedMedia()
        rows = torch.ones(4, 300_000).to(dtype)
        rows[3, 299_999] = wrong
        media.views.add().features.CopyFrom(tensors.to_proto(rows[:, -4:]))
        cache.put_pruned(keys, DIGEST, PLAIN, "", media)
        assert await cache.get_pruned(keys, DIGEST, PLAIN, "") is None


def test_the_largest_and_smallest_numbers_of_each_type_are_numbers():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        limits = torch.finfo(dtype)
        fine = torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0]).to(dtype)
        assert records.is_finite(tensors.to_proto(fine))
        long = torch.ones(2**19 + 3).to(dtype)
        long[-1] = math.nan
        assert not records.is_finite(tensors.to_proto(long))
    assert records.is_finite(tensors.to_proto(torch.tensor([-1, 2**31 - 1], dtype=torch.int32)))


async def test_scores_that_are_no_numbers_are_not_trusted_whoever_stored_them(cache):
    keys = cache.keys("not trusted")
    key = keys.encoded(DIGEST)
    value = records.pack(scored(0.5, math.nan), key=key, secret=keys.secret)
    assert await cache.store.put(key, value, owner=keys.prefix)
    assert await cache.get_encoded(keys, DIGEST) is None
    assert await cache.store.get(key) is None


async def test_an_encoder_that_comes_back_in_another_type_finds_none_of_its_old_entries(cache):
    bf16, f32 = tensor_pb2.DATA_TYPE_BF16, tensor_pb2.DATA_TYPE_F32
    keys = cache.keys("types")
    media = pruner_service_pb2.PrunedMedia()
    media.views.add().features.CopyFrom(tensors.to_proto(torch.ones(2, 2).bfloat16()))
    await cache.put_encoded(keys, DIGEST, scored(0.5, dtype=bf16))
    cache.put_pruned(keys, DIGEST, PLAIN, "", media)
    assert await cache.get_encoded(keys, DIGEST) == scored(0.5, dtype=bf16)
    assert await cache.get_pruned(keys, DIGEST, PLAIN, "") == media
    await cache.put_encoded(keys, bytes(32), scored(0.5, dtype=f32))  # now it answers in another
    assert await cache.get_encoded(keys, DIGEST) is None
    assert await cache.get_pruned(keys, DIGEST, PLAIN, "") is None
    await cache.put_encoded(keys, DIGEST, scored(0.7, dtype=f32))
    assert await cache.get_encoded(keys, DIGEST) == scored(0.7, dtype=f32)


# --- nothing stored -------------------------------------------------------------------------------


async def test_no_store_keeps_nothing():
    cache = over(NoStore())
    keys = cache.keys("t")
    cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) is None
    await cache.close()


@pytest.mark.parametrize("damage", [b"", b"garbage", b"HPR1" + bytes(50), None], ids=repr)
@pytest.mark.parametrize("size", [12, 600_000])
async def test_a_damaged_value_is_a_miss_and_is_deleted(damage, size, cache):
    keys = cache.keys("damaged")
    key = keys.encoded(DIGEST)
    await cache.put_encoded(keys, DIGEST, image(size=size))
    assert await cache.get_encoded(keys, DIGEST) == image(size=size)
    value = await cache.store.get(key)
    damaged = damage if damage is not None else value[: len(value) // 2]
    assert await cache.store.put(key, damaged, owner=keys.prefix)
    assert await cache.get_encoded(keys, DIGEST) is None
    assert await cache.store.get(key) is None
    cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) == image()


async def test_a_value_replaced_while_it_is_read_stays_and_is_called_no_damage(redis_server, caplog):
    stores = [RedisStore(redis_server, ttl_s=60, timeout_s=5) for _ in range(2)]
    reader, writer = caches = [
        TokenCache(store, secret=SECRET, model=MODEL, max_value_bytes=10_000_000) for store in stores
    ]
    keys = reader.keys("replaced")
    await reader.put_encoded(keys, DIGEST, image(size=3_000_000))
    plain = reader.store._redis.execute_command

    async def execute(*command):
        answer = await plain(*command)
        if command[0] == "GETRANGE":
            reader.store._redis.execute_command = plain
            await writer.put_encoded(writer.keys("replaced"), DIGEST, image(size=3_000_002))
        return answer

    reader.store._redis.execute_command = execute
    assert await reader.get_encoded(keys, DIGEST) is None
    assert await reader.get_encoded(keys, DIGEST) == image(size=3_000_002)
    assert "damaged" not in caplog.text
    for cache in caches:
        await cache.close()


async def test_a_value_moved_under_another_key_is_a_miss(cache):
    keys = cache.keys("moved")
    await cache.put_encoded(keys, DIGEST, image())
    value = await cache.store.get(keys.encoded(DIGEST))
    assert await cache.store.put(keys.encoded(bytes(32)), value, owner=keys.prefix)
    assert await cache.get_encoded(keys, bytes(32)) is None


# --- tenants --------------------------------------------------------------------------------------


async def test_tenants_never_share_an_image(cache):
    alice, bob = cache.keys("alice"), cache.keys("bob")
    await cache.put_encoded(alice, DIGEST, image())
    assert await cache.get_encoded(alice, DIGEST) == image()
    assert await cache.get_encoded(bob, DIGEST) is None
    key, theirs = alice.encoded(DIGEST), bob.encoded(DIGEST)
    assert key != theirs
    assert alice.prefix != bob.prefix
    value = records.pack(image(), key=key, secret=alice.secret)
    with pytest.raises(records.DamagedRecord):
        records.unpack(value, Encoded, key=key, secret=bob.secret)
    assert await cache.store.put(theirs, value, owner=bob.prefix)  # somebody copies it over
    assert await cache.get_encoded(bob, DIGEST) is None


def test_a_tenants_entries_share_a_prefix_that_does_not_tell_its_name():
    keys = TenantKeys(SECRET, "alice", MODEL)
    all_of_them = [
        keys.encoded(DIGEST),
        keys.pruned(DIGEST, PLAIN, ""),
        keys.pruned(DIGEST, PLUS_PLUS, "hello"),
        keys.claim(DIGEST, {9}, aligned=True),
    ]
    for key in all_of_them:
        assert key.startswith(keys.prefix + b":")
        assert re.fullmatch(rb"hiprune:v1:\{[0-9a-f]{32}\}:[epl]:[0-9a-f]{64}", key)
    assert len(set(all_of_them)) == 4


def test_another_secret_or_a_similar_name_is_another_tenant():
    names = ["alice", "Alice", "alice ", "", "älice", "alice\0", "a" * 10_000]
    keys = [TenantKeys(SECRET, name, MODEL) for name in names]
    keys += [TenantKeys(SECRET + b"x", "alice", MODEL), TenantKeys(b"", "alice", MODEL)]
    assert len({each.encoded(DIGEST) for each in keys}) == len(keys)
    assert len({each.secret for each in keys}) == len(keys)
    assert TenantKeys(SECRET, "alice", MODEL).encoded(DIGEST) == keys[0].encoded(DIGEST)


async def test_tenants_are_bounded_apart(redis_server):
    for store in (
        MemoryStore(3_000_000, 60, share_bytes=1_000_000),
        RedisStore(redis_server, ttl_s=60, timeout_s=5, share_bytes=1_000_000),
    ):
        cache = over(store)
        alice, bob = cache.keys("bounded alice"), cache.keys("bounded bob")
        assert cache.keys("bounded alice") is alice  # derived once
        await cache.put_encoded(alice, DIGEST, image(size=400_000))
        for number in range(5):
            await cache.put_encoded(bob, number.to_bytes(32, "little"), image(size=400_000))
        found = [await cache.get_encoded(bob, number.to_bytes(32, "little")) for number in range(5)]
        assert [each is not None for each in found] == [False, False, False, True, True]
        assert await cache.get_encoded(alice, DIGEST) is not None
        await cache.close()


# --- what another tenant can tell -----------------------------------------------------------------


class Watched:
    """A store that writes down what it is asked, without what differs between any two entries."""

    def __init__(self, store) -> None:
        self._store = store
        self.seen: list[tuple[str, int, bool]] = []

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    async def get(self, key: bytes) -> bytes | None:
        value = await self._store.get(key)
        self.seen.append(("get", len(key), value is not None))
        return value

    async def put(self, key: bytes, value: bytes, *, owner: bytes) -> bool:
        done = await self._store.put(key, value, owner=owner)
        self.seen.append(("put", len(value), done))
        return done


async def ask(cache: TokenCache, flights: SingleFlight, tenant: str, digest: bytes) -> list[str]:
    """A look-up of both levels as the pruner makes it, and the work of a miss: what was run."""
    ran: list[str] = []
    keys = cache.keys(tenant)
    if await cache.get_pruned(keys, digest, PLAIN, "") is not None:
        return ["pruned hit"]
    if await cache.get_encoded(keys, digest) is not None:
        return ["encoded hit"]

    async def make():
        ran.append("encoder")
        await asyncio.sleep(0)
        return None, cache.put_encoded(keys, digest, image(size=600))

    key = keys.claim(digest, {9, 23}, aligned=True)
    await flights.run(
        key,
        lambda: cache.replicas.once(
            key, find=lambda: cache.get_encoded(keys, digest, again=True), make=make, wait_s=5
        ),
    )
    cache.put_pruned(keys, digest, PLAIN, "", pruner_service_pb2.PrunedMedia(vision_digest="v"))
    return ran


async def test_what_one_tenant_has_asked_changes_nothing_for_another(redis_server):
    """Paired: the same image with and without another tenant's entries; every operation, size and outcome."""
    for store in (MemoryStore(10_000_000, 60), RedisStore(redis_server, ttl_s=60, timeout_s=5)):
        flights: SingleFlight = SingleFlight()
        traces = []
        for pair, before in (("with", True), ("without", False)):
            watched = Watched(store)
            cache = over(watched)
            digest = hashlib.sha256(pair.encode()).digest()
            if before:
                assert await ask(cache, flights, "timing alice", digest) == ["encoder"]
                await cache.settled()
                assert await ask(cache, flights, "timing alice", digest) == ["pruned hit"]
                watched.seen.clear()
            ran = await ask(cache, flights, "timing bob", digest)
            await cache.settled()
            # two puts of one answer may overtake each other
            gets = [each for each in watched.seen if each[0] == "get"]
            traces.append((ran, gets, sorted(each for each in watched.seen if each[0] == "put")))
        assert traces[0] == traces[1]
        assert traces[0][0] == ["encoder"]
        assert [len(each) for each in traces[0][1:]] in ([2, 2], [3, 2])
        await store.close()


async def test_tenants_who_ask_at_once_do_not_wait_for_each_other(redis_server):
    cache = over(RedisStore(redis_server, ttl_s=60, timeout_s=5))
    flights: SingleFlight = SingleFlight()
    ran = await asyncio.gather(*(ask(cache, flights, f"at once {name}", DIGEST) for name in "abc"))
    assert ran == [["encoder"]] * 3
    await cache.close()


# --- what identifies an answer --------------------------------------------------------------------


@pytest.mark.parametrize("field", ["vision_digest", "preprocessing_digest", "paired_digest"])
def test_another_model_is_another_entry(field):
    other = TenantKeys(SECRET, "t", dataclasses.replace(MODEL, **{field: "other"}))
    keys = TenantKeys(SECRET, "t", MODEL)
    assert other.encoded(DIGEST) != keys.encoded(DIGEST)
    assert other.pruned(DIGEST, PLAIN, "") != keys.pruned(DIGEST, PLAIN, "")


def test_parts_of_an_identity_cannot_slide_into_each_other():
    one = ModelIdentity("ab", "c", "d", None)
    other = ModelIdentity("a", "bc", "d", None)
    assert TenantKeys(SECRET, "t", one).encoded(DIGEST) != TenantKeys(SECRET, "t", other).encoded(DIGEST)


def test_the_question_counts_only_where_the_method_reads_it():
    keys = TenantKeys(SECRET, "t", MODEL)
    assert keys.pruned(DIGEST, PLAIN, "one") == keys.pruned(DIGEST, PLAIN, "two")
    assert keys.pruned(DIGEST, PLUS_PLUS, "one") != keys.pruned(DIGEST, PLUS_PLUS, "two")
    assert keys.pruned(DIGEST, PLUS_PLUS, "") != keys.pruned(DIGEST, PLAIN, "")


def test_a_ratio_and_its_count_share_an_entry():
    keys = TenantKeys(SECRET, "t", MODEL)
    third, count = policy(keep_ratio=1 / 3), policy(keep_count=192)
    assert keys.pruned(DIGEST, third, "") == keys.pruned(DIGEST, count, "")
    assert keys.pruned(DIGEST, third, "") != keys.pruned(DIGEST, policy(keep_count=191), "")
    free = TenantKeys(SECRET, "t", dataclasses.replace(MODEL, fixed_tokens=None))
    assert free.pruned(DIGEST, third, "") != free.pruned(DIGEST, count, "")


# --- media ----------------------------------------------------------------------------------------


def of_image(data: bytes) -> bytes:
    return media_digest(media_pb2.Media(image=data))


def of_video(*frames: bytes, **rate: float) -> bytes:
    return media_digest(media_pb2.Media(video=Video(frames=frames, **rate)))


def test_a_media_digest_is_sha256_of_all_of_it():
    assert len(of_image(b"x")) == 32
    assert of_image(b"x") == of_image(b"x") != of_image(b"y")
    assert of_video(b"x", b"y") == of_video(b"x", b"y") != of_video(b"y", b"x")


def test_an_image_is_not_a_video_of_one_frame():
    assert of_image(b"x") != of_video(b"x")


def test_where_one_frame_ends_and_the_next_begins_matters():
    found = [of_video(b"ab", b"c"), of_video(b"a", b"bc"), of_video(b"abc"), of_video(b"ab", b"c", b"")]
    length = (1).to_bytes(8, "little")  # a frame that spells a length of its own
    found += [of_video(b"a" + length + b"b"), of_video(b"a", b"b")]
    assert len(set(found)) == len(found)


def test_the_frame_rate_matters_and_its_default_is_two():
    rates = [of_video(b"x", frames_per_second=rate) for rate in (1, 2, 2.0000001, 30)]
    assert len(set(rates)) == 4
    assert of_video(b"x") == rates[1]
