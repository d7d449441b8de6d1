"""The client library against the real services: what each of its methods gives, in numpy and in torch."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import torch

import hiprune
from hiprune import errors
from hiprune.stack import Stack
from tests.stacks import picture, questions

SAMPLE = questions()[0]


@pytest.fixture
async def whole(stack: Stack):
    """A client of all three services."""
    async with hiprune.Client(
        stack.address, pruner=stack.pruner_address, encoder=stack.encoder_address
    ) as client:
        yield client


async def test_prune_gives_the_tokens_that_an_answer_is_made_of(whole):
    image, chosen = picture(SAMPLE["image"]), hiprune.policy("hiprune++", keep="1/3", scores=True)
    answer = await whole.ask(SAMPLE["question"], image, policy=chosen)
    pruned = await whole.prune(image, policy=chosen, question=SAMPLE["question"])
    (view,) = pruned.views
    (reported,) = answer.media
    assert view.kept_indices == reported.views[0].kept_indices
    assert view.kinds == reported.views[0].kinds
    assert pruned.method == reported.method == "hiprune++"
    assert pruned.cache == "pruned hit"  # the answer's
    count = view.grid[0] * view.grid[1]
    assert pruned.tokens_before == answer.tokens_before == count
    assert pruned.tokens_kept == answer.tokens_kept == round(count / 3) == len(view.kept_indices)
    assert sum(view.counts.values()) == pruned.tokens_kept
    assert view.features.shape[0] == pruned.tokens_kept
    assert view.features.torch().shape == view.features.numpy().shape
    assert view.scores.similarity.numpy().shape == (count,)
    assert reported.views[0].features is None
    assert pruned.message.vision_digest


@pytest.mark.parametrize("method", ["hiprune++", "visionzip", "divprune"])
async def test_encoding_and_pruning_by_hand_keep_what_the_pruner_keeps(whole, method):
    image, chosen = picture(SAMPLE["image"]), hiprune.policy(method, keep=40)
    pruned = await whole.prune(image, policy=chosen, question=SAMPLE["question"])
    layers = sorted({pruned.policy.object_layer, pruned.deep_layer} - {0})
    encoded = await whole.encode(image, layers=layers, aligned=True)
    assert sorted(encoded.views[0].attention) == sorted(encoded.views[0].cls_attention) == layers
    again = await whole.prune_tokens(encoded, policy=chosen, question=SAMPLE["question"])
    assert again.views[0].kept_indices == pruned.views[0].kept_indices
    assert again.views[0].kinds == pruned.views[0].kinds
    assert again.views[0].features == pruned.views[0].features
    assert again.cache == "unspecified"
    tokens = encoded.views[0].features.numpy()
    kept = list(again.views[0].kept_indices)
    assert np.array_equal(again.views[0].features.numpy(), tokens[kept])


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
async def test_anybodys_tokens_are_pruned(whole, make):
    rng = np.random.default_rng(7)
    count, grid = 30, (5, 6)
    features = rng.normal(size=(count, 8)).astype("f4")
    scores = {layer: rng.random(count).astype("f4") for layer in (3, 9)}
    view = hiprune.View(
        grid=grid, features=make(features), attention={layer: make(each) for layer, each in scores.items()}
    )
    pruned = await whole.prune_tokens(
        view,
        policy=hiprune.policy("hiprune++", keep=9, object_layer=3, beta=1.0),
        text_vector=make(features[4]),
    )
    (kept,) = pruned.views
    assert len(kept.kept_indices) == 9
    assert set(kept.kinds) == {"text"}
    cosine = features @ features[4] / np.linalg.norm(features, axis=1)
    assert set(kept.kept_indices) == set(np.argsort(-cosine)[:9])
    assert np.array_equal(kept.features.numpy(), features[list(kept.kept_indices)])
    similar = await whole.prune_tokens(
        view,
        policy=hiprune.policy("hiprune++", keep=9, object_layer=3, beta=1.0),
        similarity=make(cosine.astype("f4")),
    )
    assert similar.views[0].kept_indices == kept.kept_indices


async def test_bfloat16_tokens_come_back_as_they_were(whole):
    features = torch.randn(12, 4).to(torch.bfloat16)
    view = hiprune.View(grid=(3, 4), features=features, valid=(0, 0, 3, 2))
    pruned = await whole.prune_tokens(view, policy=hiprune.policy("strided", keep=3))
    (kept,) = pruned.views
    assert kept.valid == (0, 0, 3, 2)
    assert torch.equal(kept.features.torch(), features[list(kept.kept_indices)])


async def test_a_stream_takes_what_ask_takes_and_tells_it_in_pieces(whole):
    answer = await whole.ask(SAMPLE["question"], picture(SAMPLE["image"]))
    kinds, text = [], ""
    async for event in whole.ask_stream(SAMPLE["question"], picture(SAMPLE["image"])):
        kinds.append(event.WhichOneof("event"))
        text += event.delta.text
    assert kinds[0] == "report"
    assert set(kinds[1:-1]) == {"delta"}
    assert kinds[-1] == "completion"
    assert text == answer.text


async def test_what_a_service_refuses_keeps_its_field_and_reason(whole):
    with pytest.raises(errors.InvalidInput) as refused:
        await whole.prune(b"no picture")
    assert (refused.value.field, refused.value.reason) == ("media.image", "IMAGE_UNREADABLE")
    view = hiprune.View(grid=(2, 2), features=np.ones((2, 2, 1), "f4").reshape(4, 1))
    with pytest.raises(errors.InvalidInput, match=r"views\[0\]\.attention"):
        await whole.prune_tokens(view, policy=hiprune.policy("hiprune"))
    with pytest.raises(errors.NotFound):
        await whole.ask("?", picture(SAMPLE["image"]), model="another")


async def test_a_call_ends_when_its_own_time_is_up(whole):
    with pytest.raises(errors.Expired):
        await whole.ask("what?", picture(SAMPLE["image"]), timeout_s=0.001)


async def test_a_cancelled_call_ends_at_once(whole):
    asking = asyncio.create_task(whole.ask(SAMPLE["question"], picture(SAMPLE["image"])))
    await asyncio.sleep(0)
    begun = time.monotonic()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert time.monotonic() - begun < 5
