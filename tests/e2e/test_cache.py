"""Claims about the cache as a client sees it, with a real Redis that comes and goes."""

from __future__ import annotations

import io
import signal

import pytest
from PIL import Image

from hiprune.client import Client
from hiprune.stack import Stack
from hiprune.v1 import pruner_service_pb2
from tests.stacks import one_of_each_picture, picture

MISS = pruner_service_pb2.CACHE_STATUS_MISS
ENCODED = pruner_service_pb2.CACHE_STATUS_ENCODED_HIT
PRUNED = pruner_service_pb2.CACHE_STATUS_PRUNED_HIT
HIPRUNE = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_HIPRUNE)
PLUS_PLUS = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS)


def fresh_image(seed: int) -> bytes:
    """An image that no other test has shown to the shared stack."""
    with Image.open(io.BytesIO(picture("scene00.png"))) as image:
        altered = image.convert("RGB")
    altered.putpixel((seed % altered.width, seed // altered.width), (1, 2, 3))
    file = io.BytesIO()
    altered.save(file, "PNG")
    return file.getvalue()


async def status(client: Client, question: str, image: bytes, policy) -> int:
    answer = await client.ask(question, image, policy=policy)
    return answer.report.media[0].cache


async def test_the_second_identical_question_hits_the_pruned_cache(client):
    image = fresh_image(1)
    assert await status(client, "count the shapes .", image, PLUS_PLUS) == MISS
    assert await status(client, "count the shapes .", image, PLUS_PLUS) == PRUNED


async def test_another_question_hits_the_encoded_cache_under_plus_plus_and_the_pruned_under_hiprune(client):
    image = fresh_image(2)
    assert await status(client, "count the shapes .", image, PLUS_PLUS) == MISS
    assert await status(client, "which shape is blue ?", image, PLUS_PLUS) == ENCODED
    assert await status(client, "count the shapes .", image, HIPRUNE) == ENCODED
    assert await status(client, "which shape is blue ?", image, HIPRUNE) == PRUNED


async def test_an_image_seen_under_hiprune_serves_a_question_under_plus_plus(client):
    image = fresh_image(5)
    assert await status(client, "count the shapes .", image, HIPRUNE) == MISS
    assert await status(client, "count the shapes .", image, PLUS_PLUS) == ENCODED


async def test_another_ratio_or_layer_prunes_again_from_the_encoded_image(client):
    image = fresh_image(3)
    question = "count the shapes ."
    assert await status(client, question, image, HIPRUNE) == MISS
    fewer = pruner_service_pb2.PrunePolicy(keep_count=20)
    assert await status(client, question, image, fewer) == ENCODED
    layer = pruner_service_pb2.PrunePolicy(object_layer=5)
    assert await status(client, question, image, layer) == MISS  # a layer that was not recorded
    assert await status(client, question, image, layer) == PRUNED
    other = pruner_service_pb2.PrunePolicy(object_layer=5, keep_count=20)
    assert await status(client, question, image, other) == ENCODED  # the union holds the old layers too
    assert await status(client, question, image, pruner_service_pb2.PrunePolicy(keep_count=21)) == ENCODED


async def test_a_cached_answer_equals_a_computed_one(client):
    image = fresh_image(4)
    for policy in (HIPRUNE, PLUS_PLUS):
        first = await client.ask("which shape is blue ?", image, policy=policy)
        second = await client.ask("which shape is blue ?", image, policy=policy)
        assert second.report.media[0].cache == PRUNED
        assert second.report.media[0].views == first.report.media[0].views
        assert second.report.media[0].summary == first.report.media[0].summary
        assert second.completion.token_ids == first.completion.token_ids


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "paused"])
async def test_redis_lost_in_the_middle_costs_time_and_no_answer(how):
    # of a picture each: what is on its way to a Redis that does not take it can still be read here
    samples = one_of_each_picture()[:4]
    assert len({sample["image"] for sample in samples}) == 4
    with Stack() as stack:
        async with Client(stack.address) as client:
            before = []
            for sample in samples:
                before.append(await client.ask(sample["question"], picture(sample["image"]), policy=HIPRUNE))
            redis = stack.processes["redis"]
            redis.send_signal(how)
            for sample, answer in zip(samples, before, strict=True):
                without = await client.ask(sample["question"], picture(sample["image"]), policy=HIPRUNE)
                assert without.text == answer.text
                assert without.report.media[0].cache == MISS
                assert without.report.media[0].views == answer.report.media[0].views


async def test_without_redis_the_process_caches(stack):
    with Stack(redis=False) as small:
        async with Client(small.address) as client:
            image = picture("scene03.png")
            assert await status(client, "count the shapes .", image, HIPRUNE) == MISS
            assert await status(client, "count the shapes .", image, HIPRUNE) == PRUNED
