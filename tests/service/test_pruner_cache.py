"""Claims about pruners that share a cache, over real gRPC and a real Redis: what one encodes, all find."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack

import grpc
import pytest
import torch

from hiprune import tensors
from hiprune.checkpoints import open_checkpoint
from hiprune.errors import Internal, from_rpc
from hiprune.v1 import media_pb2, pruner_service_pb2_grpc, tensor_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from tests.service.test_pruner_tokens import Encoder, Serving, started, without_cls

MISS, ENCODED, PRUNED = pb.CACHE_STATUS_MISS, pb.CACHE_STATUS_ENCODED_HIT, pb.CACHE_STATUS_PRUNED_HIT


class Replica:
    """One of several pruners: its client, and what it is made of."""

    def __init__(self, service, channel: grpc.aio.Channel) -> None:
        self.stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
        self.cache = service._servicer._cache

    def ask(self, image: bytes, keep: int = 20) -> asyncio.Future:
        """A PruneImage on its way."""
        request = pb.PruneImageRequest(
            media=media_pb2.Media(image=image), policy=pb.PrunePolicy(keep_count=keep)
        )
        return asyncio.ensure_future(self.stub.PruneImage(request, timeout=30))


@pytest.fixture
async def encoder(model):
    return Encoder(open_checkpoint(str(model)), model.parent / "clip")


@pytest.fixture
async def replicas(encoder, model, start_redis):
    """Two pruners with one encoder and one Redis, and the Redis' process."""
    url, redis = start_redis()
    settings = {"cache": "redis", "cache_secret": "s" * 16, "redis_url": url, "cache_timeout_ms": 2000}
    async with AsyncExitStack() as stack:
        serving = Serving(encoder.register)
        await stack.enter_async_context(serving)
        made = []
        for _ in range(2):
            service = await started(serving.address, model, **settings)
            stack.push_async_callback(service.stop)
            made.append(Replica(service, await stack.enter_async_context(Serving(service.register))))
        yield (*made, redis)


async def test_pruners_that_are_asked_for_the_same_image_at_once_have_it_encoded_once(encoder, replicas):
    one, other, _ = replicas
    encoder.go_on.clear()
    first = one.ask(b"at once")
    await encoder.called.wait()
    followers = [other.ask(b"at once"), other.ask(b"at once", keep=30)]
    await asyncio.sleep(0.1)
    encoder.go_on.set()
    answer, *found = [await first, *await asyncio.gather(*followers)]
    assert len(encoder.calls) == 1
    assert (answer.cache, [each.cache for each in found]) == (MISS, [ENCODED, ENCODED])
    assert found[0].media == answer.media
    await other.cache.settled()
    assert (await one.ask(b"at once", keep=30)).cache == PRUNED


async def test_what_an_encoder_from_before_encodes_for_one_pruner_serves_the_others(encoder, replicas):
    one, other, _ = replicas
    encoder.bend = without_cls
    encoder.go_on.clear()
    first = one.ask(b"from before")
    await encoder.called.wait()
    second = other.ask(b"from before", keep=30)
    await asyncio.sleep(0.1)
    encoder.go_on.set()
    assert [(await first).cache, (await second).cache] == [MISS, ENCODED]
    await one.cache.settled()
    answers = [await one.ask(b"from before", keep=40), await other.ask(b"from before", keep=50)]
    assert [each.cache for each in answers] == [ENCODED, ENCODED]
    assert len(encoder.calls) == 1


async def test_a_client_that_leaves_one_pruner_fails_nobody_at_the_other(encoder, replicas):
    one, other, _ = replicas
    encoder.go_on.clear()
    first = one.ask(b"leaves")
    await encoder.called.wait()
    second = other.ask(b"leaves")
    await asyncio.sleep(0.05)
    first.cancel()
    async with asyncio.timeout(20):
        while len(encoder.calls) < 2:  # noqa: ASYNC110  # long before the first claim runs out by itself
            await asyncio.sleep(0.01)
    encoder.go_on.set()
    assert (await second).cache == MISS


async def test_a_redis_that_dies_while_pruners_wait_for_each_other_costs_no_answer(encoder, replicas):
    one, other, redis = replicas
    encoder.go_on.clear()
    first = one.ask(b"dies")
    await encoder.called.wait()
    second = other.ask(b"dies")
    await asyncio.sleep(0.05)
    redis.kill()
    redis.wait()
    async with asyncio.timeout(20):
        while len(encoder.calls) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    encoder.go_on.set()
    answers = [await first, await second]
    assert [each.cache for each in answers] == [MISS, MISS]
    assert answers[0].media == answers[1].media


async def test_scores_that_are_no_numbers_spoil_one_answer_and_not_the_next(encoder, replicas):
    one, other, _ = replicas

    def spoil(response):
        scores = torch.rand(len(response.views[0].attention[0].scores.data) // 4)
        scores[7] = math.nan
        response.views[0].attention[0].scores.CopyFrom(tensors.to_proto(scores))

    encoder.bend = spoil
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await one.ask(b"spoilt")
    assert isinstance(from_rpc(caught.value, peer="pruner"), Internal)
    await one.cache.settled()
    encoder.bend = lambda response: None
    for each in (one, other):
        assert (await each.ask(b"spoilt")).media.views
    assert len(encoder.calls) == 2


async def test_an_encoder_that_comes_back_in_another_type_mixes_with_nothing_old(encoder, replicas):
    one, _, _ = replicas

    async def dtype_of(image: bytes) -> tuple[int, int]:
        answer = await one.ask(image)
        await one.cache.settled()
        return answer.cache, answer.media.views[0].features.dtype

    f16, bf16 = tensor_pb2.DATA_TYPE_F16, tensor_pb2.DATA_TYPE_BF16
    assert await dtype_of(b"old") == (MISS, f16)
    assert await dtype_of(b"old") == (PRUNED, f16)
    encoder.bend = as_bfloat16
    assert await dtype_of(b"new") == (MISS, bf16)
    assert await dtype_of(b"old") == (MISS, bf16)
    assert await dtype_of(b"old") == (PRUNED, bf16)


def as_bfloat16(response) -> None:
    features = response.views[0].features
    rows = tensors.from_proto(features, field="features", shape=(None, None))
    features.CopyFrom(tensors.to_proto(rows.bfloat16()))
    response.fingerprint.dtype = tensor_pb2.DATA_TYPE_BF16
