"""Towers on a GPU say what they say on the CPU, with and without graphs, alone and in batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hiprune.checkpoints import locate_paired, open_checkpoint
from hiprune.config import EMBEDDED_MODEL
from services.encoder.families import EncodedView, load_tower
from tests.tiny_qwen import make_qwen2_5_vl

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SAMPLES = sorted((EMBEDDED_MODEL.parents[1] / "samples").glob("*.png"))


def load(model: Path, device: torch.device, dtype: torch.dtype) -> Any:
    checkpoint = open_checkpoint(str(model))
    return load_tower(checkpoint, locate_paired("", checkpoint), device, dtype)


def encode(tower: Any, images: list[Image.Image], layers: set[int], aligned: bool) -> list[EncodedView]:
    items = [tower.prepare(image) for image in images]
    return [view for views in tower.encode(items, layers, [aligned] * len(items)) for view in views]


def assert_same(one: list[EncodedView], other: list[EncodedView], tolerance: float) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.grid == theirs.grid
        assert not mine.features.is_cuda
        apart = (mine.features.float() - theirs.features.float()).norm() / theirs.features.float().norm()
        assert apart <= tolerance
        for layer, scores in mine.scores.items():
            torch.testing.assert_close(scores, theirs.scores[layer], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_embedded_tower_agrees_with_the_cpu(count: int) -> None:
    facts = open_checkpoint(str(EMBEDDED_MODEL)).facts
    layers = {facts.object_layer, facts.deep_layer}
    images = [Image.open(path).convert("RGB") for path in SAMPLES[:count]]
    expected = encode(load(EMBEDDED_MODEL, torch.device("cpu"), torch.float32), images, layers, True)
    tower = load(EMBEDDED_MODEL, CUDA, torch.float32)
    assert_same(encode(tower, images, layers, True), expected, 1e-3)
    tower.warm_up(layers)  # from here on by graphs, where they are faster
    first = encode(tower, images, layers, True)
    assert_same(first, expected, 1e-3)
    # what a graph leaves is overwritten by its next replay, and must have left the device before
    encode(tower, images[::-1], layers, True)
    assert_same(first, expected, 1e-3)


def test_a_bf16_tower_is_close_and_scores_in_float32() -> None:
    facts = open_checkpoint(str(EMBEDDED_MODEL)).facts
    layers = {facts.object_layer, facts.deep_layer}
    images = [Image.open(path).convert("RGB") for path in SAMPLES[:4]]
    expected = encode(load(EMBEDDED_MODEL, torch.device("cpu"), torch.float32), images, layers, False)
    views = encode(load(EMBEDDED_MODEL, CUDA, torch.bfloat16), images, layers, False)
    for view, reference in zip(views, expected, strict=True):
        assert view.features.dtype == torch.bfloat16
        for layer, scores in view.scores.items():
            assert scores.dtype == torch.float32
            both = torch.stack((scores, reference.scores[layer]))
            assert torch.corrcoef(both)[0, 1] > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_tower_agrees_with_the_cpu_for_mixed_sizes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_qwen2_5_vl(tmp_path / "qwen", seed=1, vision_hidden=256)
    layers = {open_checkpoint(str(model)).facts.object_layer}
    torch.manual_seed(0)
    images = [
        Image.fromarray(torch.randint(0, 255, (height, width, 3), dtype=torch.uint8).numpy())
        for height, width in ((64, 64), (200, 120), (336, 448))
    ]
    expected = encode(load(model, torch.device("cpu"), torch.float32), images, layers, False)
    tower = load(model, CUDA, dtype)
    # in bfloat16 features are 0.03 from float32's on the CPU too
    assert_same(encode(tower, images, layers, False), expected, 1e-3 if dtype == torch.float32 else 6e-2)
    together = encode(tower, images, layers, False)
    alone = [view for image in images for view in encode(tower, [image], layers, False)]
    assert_same(together, alone, 1e-3 if dtype == torch.float32 else 2e-2)
