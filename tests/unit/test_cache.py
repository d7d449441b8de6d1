"""The cache: tenants never share, what was put is found, and what is damaged or too large is a miss."""

from __future__ import annotations

import asyncio
import dataclasses
import re

import pytest

from hiprune.v1 import encoder_service_pb2, media_pb2, pruner_service_pb2, tensor_pb2
from services.pruner import records
from services.pruner.cache import ModelIdentity, TenantKeys, TokenCache, media_digest
from services.pruner.policy import Policy, resolve_layers
from services.pruner.stores import MemoryStore, NoStore, RedisStore

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

    async def put(self, key: bytes, value: bytes) -> None:
        self.begun += 1
        turn = self.begun
        await self.gate.wait()
        await asyncio.sleep(0.1 / turn)
        await super().put(key, value)


def over(store) -> TokenCache:
    return TokenCache(store, secret=SECRET, model=MODEL, max_value_bytes=1_000_000)


# --- there and back -------------------------------------------------------------------------------


async def test_what_was_put_is_found_in_both_levels(cache):
    keys = cache.keys("found")
    assert await cache.get_encoded(keys, DIGEST) is None
    cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) == image()
    media = pruner_service_pb2.PrunedMedia(vision_digest="v")
    assert await cache.get_pruned(keys, DIGEST, PLAIN, "") is None
    cache.put_pruned(keys, DIGEST, PLAIN, "", media)
    assert await cache.get_pruned(keys, DIGEST, PLAIN, "") == media
    assert await cache.get_encoded(keys, bytes(32)) is None


async def test_a_large_value_comes_back_as_it_was(cache):
    keys = cache.keys("large")
    cache.put_encoded(keys, DIGEST, image(size=900_000))
    assert await cache.get_encoded(keys, DIGEST) == image(size=900_000)


async def test_a_request_reads_what_this_process_is_just_writing():
    store = SlowStore()
    cache = over(store)
    keys = cache.keys("t")
    cache.put_encoded(keys, DIGEST, image())
    reading = asyncio.create_task(cache.get_encoded(keys, DIGEST))
    await asyncio.sleep(0.02)
    assert not reading.done()
    store.gate.set()
    assert await reading == image()


async def test_of_two_puts_of_one_key_the_last_stays():
    store = SlowStore()
    cache = over(store)
    keys = cache.keys("t")
    for name in ("first", "second", "third"):
        cache.put_encoded(keys, DIGEST, image(name))
    await asyncio.sleep(0.02)
    store.gate.set()
    await cache.get_encoded(keys, DIGEST)
    await asyncio.sleep(0.2)  # for stragglers
    assert (await cache.get_encoded(keys, DIGEST)).fingerprint.family == "third"


async def test_closing_finishes_every_put():
    store = SlowStore()
    cache = over(store)
    puts = []
    store_put = store.put

    async def put(key, value):
        await store_put(key, value)
        puts.append(value)

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
    cache.put_encoded(keys, DIGEST, image())
    reading = asyncio.create_task(cache.get_encoded(keys, DIGEST))
    await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.sleep(0.01)
    store.gate.set()
    assert await cache.get_encoded(keys, DIGEST) == image()


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
    store.gate.set()
    found = [await cache.get_encoded(keys, number.to_bytes(32, "little")) for number in range(200)]
    assert found[0] == image()
    assert 1 <= sum(each is not None for each in found) <= 100


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
    cache.put_encoded(keys, DIGEST, image(size=size))
    assert await cache.get_encoded(keys, DIGEST) == image(size=size)
    value = await cache.store.get(key)
    await cache.store.put(key, damage if damage is not None else value[: len(value) // 2])
    assert await cache.get_encoded(keys, DIGEST) is None
    assert await cache.store.get(key) is None
    cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) == image()


async def test_a_value_moved_under_another_key_is_a_miss(cache):
    keys = cache.keys("moved")
    cache.put_encoded(keys, DIGEST, image())
    assert await cache.get_encoded(keys, DIGEST) == image()
    await cache.store.put(keys.encoded(bytes(32)), await cache.store.get(keys.encoded(DIGEST)))
    assert await cache.get_encoded(keys, bytes(32)) is None


# --- tenants --------------------------------------------------------------------------------------


async def test_tenants_never_share_an_image(cache):
    alice, bob = cache.keys("alice"), cache.keys("bob")
    cache.put_encoded(alice, DIGEST, image())
    assert await cache.get_encoded(alice, DIGEST) == image()
    assert await cache.get_encoded(bob, DIGEST) is None
    key, theirs = alice.encoded(DIGEST), bob.encoded(DIGEST)
    assert key != theirs
    assert alice.prefix != bob.prefix
    value = await cache.store.get(key)
    with pytest.raises(records.DamagedRecord):
        records.unpack(value, Encoded, key=key, secret=bob.secret)
    await cache.store.put(theirs, value)  # somebody copies it over
    assert await cache.get_encoded(bob, DIGEST) is None


def test_a_tenants_entries_share_a_prefix_that_does_not_tell_its_name():
    keys = TenantKeys(SECRET, "alice", MODEL)
    all_of_them = [
        keys.encoded(DIGEST),
        keys.pruned(DIGEST, PLAIN, ""),
        keys.pruned(DIGEST, PLUS_PLUS, "hello"),
    ]
    for key in all_of_them:
        assert key.startswith(keys.prefix + b":")
        assert re.fullmatch(rb"hiprune:v1:[0-9a-f]{32}:[ep]:[0-9a-f]{64}", key)
    assert len(set(all_of_them)) == 3


def test_another_secret_or_a_similar_name_is_another_tenant():
    names = ["alice", "Alice", "alice ", "", "älice", "alice\0", "a" * 10_000]
    keys = [TenantKeys(SECRET, name, MODEL) for name in names]
    keys += [TenantKeys(SECRET + b"x", "alice", MODEL), TenantKeys(b"", "alice", MODEL)]
    assert len({each.encoded(DIGEST) for each in keys}) == len(keys)
    assert len({each.secret for each in keys}) == len(keys)
    assert TenantKeys(SECRET, "alice", MODEL).encoded(DIGEST) == keys[0].encoded(DIGEST)


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
