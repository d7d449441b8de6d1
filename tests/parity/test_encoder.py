"""The encoder against the stock tower: features bit for bit, scores within 1e-5, and nothing else loaded."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel, LlavaForConditionalGeneration

from hiprune import tensors
from hiprune.calls import connect
from hiprune.checkpoints import locate_paired, open_checkpoint
from hiprune.config import EMBEDDED_MODEL
from hiprune.errors import from_rpc
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2
from services.encoder.families import load_tower
from tests.stacks import FACTS, SAMPLES, TOKENS, picture

LAYERS = (FACTS.object_layer, FACTS.deep_layer)


@pytest.fixture(scope="module")
def stock():
    """The stock model with eager attention, which hands its attention matrices out."""
    return LlavaForConditionalGeneration.from_pretrained(
        EMBEDDED_MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def tower():
    checkpoint = open_checkpoint(str(EMBEDDED_MODEL))
    return load_tower(checkpoint, locate_paired("", checkpoint), torch.device("cpu"), torch.float32)


def pixels_of(name: str) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(EMBEDDED_MODEL, backend="pil")
    with Image.open(SAMPLES / name) as image:
        return processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def reference(stock, name: str):
    """Features (N, D) of the layer before the last, each layer's scores (N,), and its attention from CLS."""
    output = stock.model.vision_tower(
        pixel_values=pixels_of(name), output_hidden_states=True, output_attentions=True
    )
    scores = [matrix[0].sum(dim=1).mean(dim=0)[1:] for matrix in output.attentions]
    from_cls = [matrix[0, :, 0, 1:].mean(dim=0) for matrix in output.attentions]
    return output.hidden_states[-2][0, 1:], scores, from_cls


@pytest.mark.parametrize("name", ["scene00.png", "scene07.png"])
def test_features_and_scores_equal_the_stock_tower(stock, tower, name):
    features, scores, from_cls = reference(stock, name)
    with Image.open(SAMPLES / name) as image:
        item = tower.prepare(image.convert("RGB"))
    assert torch.equal(item.pixels, pixels_of(name))
    ((view,),) = tower.encode([item], set(range(1, FACTS.deep_layer + 1)), [False])
    torch.testing.assert_close(view.features, features, rtol=1e-4, atol=1e-5)
    for layer in range(1, FACTS.deep_layer + 1):
        torch.testing.assert_close(view.scores[layer], scores[layer - 1], rtol=1e-5, atol=0)
        torch.testing.assert_close(view.cls_scores[layer], from_cls[layer - 1], rtol=1e-5, atol=1e-8)
    assert view.aligned is None


def test_batch_neighbours_change_nothing_that_matters(tower):
    items = []
    for name in ("scene00.png", "scene01.png", "scene02.png"):
        with Image.open(SAMPLES / name) as image:
            items.append(tower.prepare(image.convert("RGB")))
    together = tower.encode(items, set(LAYERS), [True, False, True])
    for place, item in enumerate(items):
        ((alone,),) = tower.encode([item], set(LAYERS), [True])
        (view,) = together[place]
        for layer in LAYERS:
            torch.testing.assert_close(view.scores[layer], alone.scores[layer], rtol=1e-5, atol=0)
        torch.testing.assert_close(view.features, alone.features, rtol=1e-4, atol=1e-5)
        assert (view.aligned is None) == (place == 1)


@torch.inference_mode()
def test_aligned_tokens_are_clips_own_projection(tower):
    clip = CLIPModel.from_pretrained(EMBEDDED_MODEL.parent / "clip", dtype=torch.float32).eval()
    with Image.open(SAMPLES / "scene04.png") as image:
        item = tower.prepare(image.convert("RGB"))
    ((view,),) = tower.encode([item], set(), [True])
    expected = clip.visual_projection(clip.vision_model.post_layernorm(view.features))
    expected = expected / expected.norm(dim=-1, keepdim=True)
    assert view.aligned.dtype == torch.float16
    torch.testing.assert_close(view.aligned.float(), expected, rtol=0, atol=1e-3)


def test_only_the_layers_up_to_the_feature_layer_are_loaded(tower, stock):
    names = {name for name, _ in tower.model.named_parameters()}
    layers = {int(part) for name in names for part in name.split(".") if part.isdigit()}
    assert layers == set(range(FACTS.deep_layer))  # the last one is behind the feature layer
    assert not any("language" in name or "projector" in name or "embed_tokens" in name for name in names)
    whole = sum(parameter.numel() for parameter in stock.parameters())
    loaded = sum(parameter.numel() for parameter in tower.model.parameters())
    vision = sum(parameter.numel() for parameter in stock.model.vision_tower.parameters())
    assert loaded < vision < whole


async def test_the_service_answers_with_what_the_tower_gives(stack, tower):
    with Image.open(SAMPLES / "scene05.png") as image:
        ((expected,),) = tower.encode([tower.prepare(image.convert("RGB"))], set(LAYERS), [True])
    async with connect(stack.encoder_address) as channel:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        request = encoder_service_pb2.EncodeImageRequest(
            media=media_pb2.Media(image=picture("scene05.png")), layers=LAYERS, aligned=True
        )
        answer = await stub.EncodeImage(request, timeout=30)
        fingerprint = (await stub.GetEncoder(encoder_service_pb2.GetEncoderRequest())).fingerprint
    (view,) = answer.views
    count = view.grid_height * view.grid_width
    assert view.grid_height == view.grid_width == math.isqrt(TOKENS)
    features = tensors.from_proto(view.features, field="features", shape=(count, 128))
    torch.testing.assert_close(features, expected.features, rtol=1e-4, atol=1e-5)
    assert [entry.layer for entry in view.attention] == list(LAYERS)
    for entry in view.attention:
        scores = tensors.from_proto(entry.scores, field="scores", shape=(count,))
        torch.testing.assert_close(scores, expected.scores[entry.layer], rtol=1e-5, atol=0)
        from_cls = tensors.from_proto(entry.cls_scores, field="cls_scores", shape=(count,))
        torch.testing.assert_close(from_cls, expected.cls_scores[entry.layer], rtol=1e-5, atol=1e-8)
    aligned = tensors.from_proto(view.aligned, field="aligned", shape=(count, None))
    assert aligned.dtype == torch.float16
    assert answer.fingerprint == fingerprint
    assert {"preprocess", "queue", "vision"} == {timing.stage for timing in answer.timings}


@pytest.mark.parametrize(
    ("request_fields", "code", "reason", "field"),
    [
        ({}, "INVALID_ARGUMENT", "MISSING_FIELD", "media"),
        ({"media": media_pb2.Media(image=b"")}, "INVALID_ARGUMENT", "MISSING_FIELD", "media.image"),
        ({"media": media_pb2.Media(image=b"GIF89a")}, "INVALID_ARGUMENT", "IMAGE_UNREADABLE", "media.image"),
        (
            {"media": media_pb2.Media(video=media_pb2.Video(frames=[b"x"]))},
            "UNIMPLEMENTED",
            "UNSUPPORTED",
            "media.video",
        ),
        ({"layers": [0]}, "INVALID_ARGUMENT", "INVALID_FIELD", "layers[0]"),
        ({"layers": [3, FACTS.deep_layer + 1]}, "INVALID_ARGUMENT", "INVALID_FIELD", "layers[1]"),
        ({"layers": [3, 3]}, "INVALID_ARGUMENT", "INVALID_FIELD", "layers[1]"),
    ],
)
async def test_a_bad_request_names_its_field(stack, request_fields, code, reason, field):
    import grpc

    if field.startswith("layers"):
        request_fields = {"media": media_pb2.Media(image=picture("scene00.png")), **request_fields}
    async with connect(stack.encoder_address) as channel:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.EncodeImage(
                encoder_service_pb2.EncodeImageRequest(**request_fields), timeout=30, wait_for_ready=True
            )
    error = from_rpc(raised.value, peer="encoder")
    assert (error.code.name, error.reason, error.field) == (code, reason, field)
