"""Qwen2.5-VL against the stock model: whole, pruned, positions, decoding, scores; images and video.

Through the three real services, on random weights. Images go through stock's own image processor; video
through our frames-to-patches, as stock's needs torchvision, and from there on through stock.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hiprune import tensors
from hiprune.calls import connect
from hiprune.checkpoints import CheckpointError, open_checkpoint
from hiprune.client import Client
from hiprune.errors import InvalidInput
from hiprune.stack import Stack
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2
from hiprune.v1 import llm_service_pb2 as llm
from hiprune.v1 import pruner_service_pb2 as pb
from services.encoder.families import load_tower
from services.encoder.families.qwen2_5_vl import LinearPatches
from services.llm.process import load as load_language_model
from services.llm.settings import Settings as LlmSettings
from services.llm.visual import VisualTokens, VisualView
from services.pruner import selection
from services.pruner.text import LanguageSpace
from tests.tiny_qwen import LAYOUTS, MERGED, make_qwen2_5_vl

ANSWER_TOKENS = 12
OBJECT, DEEP, WINDOWED = 4, 8, 3
"""Layers of the tiny tower: its middle one, its last, and one whose attention stays within windows."""
SIZES = [(64, 64), (200, 90), (31, 77), (640, 480), (90, 200), (300, 20), (48, 48), (17, 240), (333, 222)]
NONE = pb.PrunePolicy(method=pb.METHOD_NONE)
ALL = pb.PrunePolicy(method=pb.METHOD_HIPRUNE, keep_ratio=1)
THIRD = pb.PrunePolicy(method=pb.METHOD_HIPRUNE, keep_ratio=1 / 3)


@dataclass(frozen=True)
class Video:
    """Frames, and the rate at which they were sampled."""

    frames: tuple[Image.Image, ...]
    rate: float


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Coarse noise: no two patches alike, and something left of it after a resize."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size[1] // 3 + 2, size[0] // 3 + 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def video(seed: int, frames: int, rate: float = 2.0, size: tuple[int, int] = (64, 48)) -> Video:
    return Video(tuple(picture(100 * seed + number, size) for number in range(frames)), rate)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


Turn = tuple[str, list[Any]]


def user(*parts: Any) -> Turn:
    return "user", list(parts)


def assistant(words: str) -> Turn:
    return "assistant", [words]


def messages_of(turns: list[Turn]) -> list[llm.Message]:
    """The conversation on the wire."""
    messages = []
    for role, parts in turns:
        message = llm.Message(role=llm.Role.Value(f"ROLE_{role.upper()}"))
        for part in parts:
            if isinstance(part, str):
                message.parts.add(text=part)
            elif isinstance(part, Video):
                frames = media_pb2.Video(frames=map(png, part.frames), frames_per_second=part.rate)
                message.parts.add(media=media_pb2.Media(video=frames))
            else:
                message.parts.add(media=media_pb2.Media(image=png(part)))
        messages.append(message)
    return messages


@dataclass(frozen=True)
class Stock:
    """The stock model, its tokenizer and image processor; our tower for nothing but a video's patches."""

    model: Any
    tokenizer: Any
    image_processor: Any
    tower: Any
    whole: dict[str, list[int]] = field(default_factory=dict)

    def inputs(self, turns: list[Turn]) -> dict[str, torch.Tensor]:
        """What stock's processor would give `generate`."""
        media = [part for _, parts in turns for part in parts if not isinstance(part, str)]
        conversation = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part}
                    if isinstance(part, str)
                    else {"type": "video" if isinstance(part, Video) else "image"}
                    for part in parts
                ],
            }
            for role, parts in turns
        ]
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        images = [each for each in media if not isinstance(each, Video)]
        videos = [each for each in media if isinstance(each, Video)]
        inputs: dict[str, torch.Tensor] = {}
        if images:
            inputs |= self.image_processor(images=images, return_tensors="pt")
        if videos:
            prepared = [self.tower.prepare_video(each.frames, each.rate) for each in videos]
            inputs["pixel_values_videos"] = torch.cat([each.pixels.flatten(0, 3) for each in prepared])
            grids = [each.pixels.shape[:3] for each in prepared]
            inputs["video_grid_thw"] = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids])
            inputs["second_per_grid_ts"] = torch.tensor([2 / each.rate for each in videos])
        counts = {
            "image": iter(inputs.get("image_grid_thw", torch.zeros(0, 3)).prod(-1) // 4),
            "video": iter(inputs.get("video_grid_thw", torch.zeros(0, 3)).prod(-1) // 4),
        }
        kinds = {self.model.config.image_token_id: "image", self.model.config.video_token_id: "video"}
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            ids += [token] * (int(next(counts[kinds[token]])) if token in kinds else 1)
        types = [{"image": 1, "video": 2}[kinds[token]] if token in kinds else 0 for token in ids]
        inputs["input_ids"] = torch.tensor([ids])
        inputs["mm_token_type_ids"] = torch.tensor([types])
        return inputs

    def answer(self, turns: list[Turn], tokens: int = ANSWER_TOKENS) -> list[int]:
        """Greedy tokens of stock `generate`."""
        inputs = self.inputs(turns)
        mask = torch.ones_like(inputs["input_ids"])
        output = self.model.generate(**inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        return output[0, mask.shape[1] :].tolist()

    def answer_to(self, name: str) -> list[int]:
        """`answer` to one of WHOLE, generated once."""
        if name not in self.whole:
            self.whole[name] = self.answer(WHOLE[name])
        return self.whole[name]

    @torch.no_grad()
    def masked_answer(
        self,
        turns: list[Turn],
        kept: list[list[int]],
        *,
        tokens: int = ANSWER_TOKENS,
        go_on_at_max: bool = False,
    ) -> list[int]:
        """Greedy tokens of the whole sequence, no token ever seeing the visual ones that were dropped.

        `kept` are indices among each medium's tokens, slices counted on. No cache, no `generate`: each token
        is a forward of everything before it, positions those of the unpruned prompt, then the last one + 1.
        """
        inputs, model = self.inputs(turns), self.model
        ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
        hidden = model.get_input_embeddings()(ids)  # (1, S, H)
        grids = {}
        if "pixel_values" in inputs:
            grids["image_grid_thw"] = inputs["image_grid_thw"]
            features = model.model.visual(inputs["pixel_values"], grids["image_grid_thw"]).pooler_output
            hidden[types == 1] = features
        if "pixel_values_videos" in inputs:
            grids["video_grid_thw"] = inputs["video_grid_thw"]
            features = model.model.visual(
                inputs["pixel_values_videos"], grids["video_grid_thw"]
            ).pooler_output
            hidden[types == 2] = features
            grids["second_per_grid_ts"] = inputs["second_per_grid_ts"]
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, **grids)  # (3, 1, S)
        seen = types[0] == 0  # (S,)
        runs = torch.nonzero(torch.diff(types[0], prepend=torch.zeros(1))).flatten()
        starts = [int(run) for run in runs if types[0, run] != 0]
        assert len(starts) == len(kept)
        for start, indices in zip(starts, kept, strict=True):
            seen[start + torch.tensor(indices)] = True
        following = positions[:, :, -1:] + 1
        if go_on_at_max:
            following = torch.full_like(following, int(positions.max()) + 1)
        answer: list[int] = []
        while len(answer) < tokens:
            length = hidden.shape[1]
            allowed = torch.ones(length, length, dtype=torch.bool).tril() & seen  # (S, S)
            mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
            logits = model(inputs_embeds=hidden, position_ids=positions, attention_mask=mask).logits
            answer.append(int(logits[0, -1].argmax()))
            if answer[-1] == model.config.get_text_config().eos_token_id:
                break
            token = model.get_input_embeddings()(torch.tensor([answer[-1:]]))
            hidden = torch.cat([hidden, token], dim=1)
            positions = torch.cat([positions, following], dim=2)
            seen = torch.cat([seen, torch.tensor([True])])
            following = following + 1
        return answer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("models") / "tiny-qwen", seed=4, shards=3)


@pytest.fixture(scope="module")
def tower(path):
    return load_tower(open_checkpoint(str(path)), None, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def stock(path, tower) -> Stock:
    return Stock(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(path),
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(path),
        tower=tower,
    )


@pytest.fixture(scope="module")
def stack(path):
    with Stack(model=str(path), redis=False, environ={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
async def client(stack):
    async with Client(stack.address) as connected:
        yield connected


async def ask(
    client: Client, turns: list[Turn], policy: pb.PrunePolicy, tokens: int = ANSWER_TOKENS
) -> tuple[llm.PruningReport, llm.Completion]:
    request = llm.AskImageRequest(
        messages=messages_of(turns), policy=policy, sampling=llm.Sampling(max_tokens=tokens)
    )
    report, completion = llm.PruningReport(), llm.Completion()
    async for event in client.ask_stream(request):
        if event.HasField("report"):
            report = event.report
        elif event.HasField("completion"):
            completion = event.completion
    return report, completion


def kept_of(report: llm.PruningReport) -> list[list[int]]:
    """Kept tokens of each medium, counted on over its views."""
    kept = []
    for media in report.media:
        indices, start = [], 0
        for view in media.views:
            indices += [start + index for index in view.kept_indices]
            start += view.grid_height * view.grid_width
        kept.append(indices)
    return kept


WHOLE: dict[str, list[Turn]] = {
    **{f"{w}×{h}": [user(picture(n, (w, h)), "what is this ?")] for n, (w, h) in enumerate(SIZES)},
    "words first": [user("how many shapes ?", picture(20, (100, 60)))],
    "two images": [user(picture(21), picture(22, (150, 70)), "which is above ?")],
    "two images apart": [user(picture(23, (40, 90)), "what is this ?", picture(24), "and this ?")],
    "three images": [user(*(picture(25 + n, (60 + 30 * n, 64)) for n in range(3)), "what is red ?")],
    "two turns": [user(picture(28), "what is this ?"), assistant("a red ring ."), user("what is below ?")],
    "two turns with images": [
        user(picture(29, (80, 50)), "what is this ?"),
        assistant("a star ."),
        user("and this ?", picture(30, (50, 80))),
    ],
    "told": [("system", ["a b c ."]), user(picture(31), "what is this ?")],
    "text only": [user("what do you see ?")],
    "text only, two turns": [user("what is red ?"), assistant("a star ."), user("what is above ?")],
    "video of 1": [user(video(1, 1), "what is this ?")],
    "video of 2": [user(video(2, 2), "what is this ?")],
    "video of 3": [user(video(3, 3, rate=1.0), "what is red ?")],
    "video of 8": [user(video(4, 8), "what is this ?")],
    "slow video of 8": [user(video(5, 8, rate=0.3), "what is above ?")],
    "fast video of 5": [user(video(6, 5, rate=30.0, size=(90, 40)), "what is this ?")],
    "image and video": [user(picture(32), "and", video(7, 4, rate=1.5), "which is red ?")],
    "video, then image": [
        user(video(8, 3, rate=0.7), "what is this ?"),
        assistant("a ring ."),
        user(picture(33), "and this ?"),
    ],
}


# keep 100 %


@pytest.mark.parametrize("policy", [NONE, ALL], ids=["none", "all"])
@pytest.mark.parametrize("name", WHOLE)
async def test_keeping_every_token_is_the_stock_model_token_for_token(client, stock, name, policy):
    report, completion = await ask(client, WHOLE[name], policy)
    assert list(completion.token_ids) == stock.answer_to(name)
    assert completion.usage.visual_tokens_after == completion.usage.visual_tokens_before
    assert [media.summary.tokens_kept for media in report.media] == [
        media.summary.tokens_before for media in report.media
    ]


def test_the_inputs_above_are_many_and_their_answers_differ(stock):
    """Or equality would show little."""
    assert len(WHOLE) >= 20
    answers = {tuple(stock.answer_to(name)) for name in WHOLE}
    assert len(answers) > 0.9 * len(WHOLE)


@pytest.mark.parametrize("tied", [False, True], ids=["own output matrix", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_each_layout_on_disk_gives_both_services_stocks_weights_and_no_others(tmp_path, layout, tied):
    path = make_qwen2_5_vl(tmp_path / "model", seed=5, layout=layout, tied=tied)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()
    tower = load_tower(open_checkpoint(str(path)), None, torch.device("cpu"), torch.float32)
    language = load_language_model(LlmSettings(model=str(path)))
    await language.engine.start()
    held = {f"model.visual.{key}": value for key, value in tower.model.state_dict().items()}
    assert not any("visual" in key for key in language.engine._model.state_dict())
    held |= language.engine._model.state_dict()
    await language.engine.stop()
    assert held.keys() == stock.keys()
    assert all(torch.equal(held[key], stock[key]) for key in held)


# pruned


PRUNED = [
    "640×480",
    "300×20",
    "two images apart",
    "two turns with images",
    "video of 3",
    "video of 8",
    "slow video of 8",
    "image and video",
]


@pytest.mark.parametrize("name", PRUNED)
async def test_pruned_is_stock_on_the_full_sequence_with_dropped_tokens_masked(client, stock, name):
    report, completion = await ask(client, WHOLE[name], THIRD)
    kept = kept_of(report)
    assert completion.usage.visual_tokens_after == sum(map(len, kept))
    assert completion.usage.visual_tokens_after < 0.5 * completion.usage.visual_tokens_before
    ours = list(completion.token_ids)
    assert ours == stock.masked_answer(WHOLE[name], kept)


async def test_pruned_answers_are_not_those_of_the_whole(client, stock):
    """Or the test above would not notice pruning."""
    same = 0
    for name in PRUNED:
        _, completion = await ask(client, WHOLE[name], THIRD)
        same += list(completion.token_ids) == stock.answer_to(name)
    assert same < len(PRUNED) / 2


LATE = [user(video(9, 8, rate=0.1), "what is this ?")]
"""Slices 20 s apart: the last slice's time is far beyond every position of the text behind it."""


async def test_decoding_of_video_goes_on_at_the_last_position_as_stock_does(client, stock):
    inputs = stock.inputs(LATE)
    positions, _ = stock.model.model.get_rope_index(
        **{
            key: inputs[key]
            for key in ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
        }
    )
    assert positions[:, 0, -1].max() + 1 < positions.max() + 1
    everything = [list(range(int((inputs["mm_token_type_ids"] == 2).sum())))]
    _, completion = await ask(client, LATE, NONE)
    ours = list(completion.token_ids)
    assert ours == stock.answer(LATE) == stock.masked_answer(LATE, everything)
    assert ours != stock.masked_answer(LATE, everything, go_on_at_max=True)


async def test_decoding_of_pruned_video_goes_on_at_the_unpruned_last_position(client, stock):
    report, completion = await ask(client, LATE, THIRD)
    kept = kept_of(report)
    ours = list(completion.token_ids)
    assert ours == stock.masked_answer(LATE, kept)
    assert ours != stock.masked_answer(LATE, kept, go_on_at_max=True)


# pixels and scores


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_of_an_image_are_stocks(tower, stock, size):
    image = picture(3, size)
    expected = stock.image_processor(images=image, return_tensors="pt")
    prepared = tower.prepare(image)
    assert torch.equal(prepared.pixels.flatten(0, 3), expected["pixel_values"])
    _, height, width = expected["image_grid_thw"][0].tolist()
    assert prepared.pixels.shape[:3] == (1, height // 2, width // 2)
    assert prepared.patches == height * width


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_pixels_of_a_video_are_those_of_its_frames_two_by_two_the_odd_last_one_repeated(tower, frames):
    film = video(1, frames)
    stills = [tower.prepare(frame).pixels for frame in film.frames]  # (1, H, W, 4, C·2·p·p) each
    stills += stills[-1:] * (frames % 2)
    prepared = tower.prepare_video(film.frames, film.rate)
    assert prepared.pixels.shape[0] == len(stills) // 2
    for number, slices in enumerate(prepared.pixels.unflatten(-1, (3, 2, 8, 8)).split(1)):
        for time in range(2):
            still = stills[2 * number + time].unflatten(-1, (3, 2, 8, 8))
            assert torch.equal(slices[:, :, :, :, :, time], still[:, :, :, :, :, 0])


def test_the_first_layer_as_a_product_is_stocks_convolution(tower):
    stock = tower.model.patch_embed
    patches = tower.prepare(picture(1)).pixels.flatten(0, 3)
    expected = stock(patches)
    assert expected.std() > 0.1
    torch.testing.assert_close(LinearPatches(stock.proj.weight)(patches), expected, rtol=1e-4, atol=1e-5)


def test_a_videos_layout_says_when_its_slices_are(tower):
    layout = tower.prepare_video(video(1, 5).frames, 0.5).layout
    assert layout.video
    assert layout.seconds_per_slice == 4
    assert list(layout.sampled_frames) == [0, 1, 2, 3, 4]


def test_a_video_takes_its_own_processors_sizes_where_there_is_one(tmp_path):
    path = make_qwen2_5_vl(tmp_path / "model")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    settings |= {"max_pixels": 4 * MERGED**2, "fps": 2, "video_processor_type": "Qwen2VLVideoProcessor"}
    (path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    tower = load_tower(open_checkpoint(str(path)), None, torch.device("cpu"), torch.float32)
    assert tower.prepare(picture(1)).pixels.shape[:3] == (1, 4, 4)
    assert tower.prepare_video([picture(1)] * 2, 2.0).pixels.shape[:3] == (1, 2, 2)


@torch.no_grad()
def eager_reference(stock: Stock, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Scores (T·N,) of one medium's merged tokens, row-major, by whole attention matrices of one head each.

    `pixels` (T, H, W, 4, P). The order in which the tower works is not computed but seen: each patch's
    embedding is looked up among those that enter the first block.
    """
    visual = stock.model.model.visual
    slices, height, width = pixels.shape[:3]
    patches = pixels.flatten(0, 3)
    seen: dict[str, Any] = {}

    def first_block(module, args, kwargs):
        seen["first"] = args[0] if args else kwargs["hidden_states"]

    def attention(module, args, kwargs):
        seen.update(kwargs)
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    block = visual.blocks[layer - 1]
    hooks = [
        visual.blocks[0].register_forward_pre_hook(first_block, with_kwargs=True),
        block.attn.register_forward_pre_hook(attention, with_kwargs=True),
    ]
    visual(patches, torch.tensor([(slices, 2 * height, 2 * width)]))
    for hook in hooks:
        hook.remove()
    length, heads = len(patches), block.attn.num_heads
    query, key, _ = block.attn.qkv(seen["hidden"]).view(length, 3, heads, -1).unbind(1)  # (n, heads, d)
    cosine, sine = (each[:, None] for each in seen["position_embeddings"])  # (n, 1, d)

    def rotated(each):
        left, right = each.chunk(2, dim=-1)
        return each * cosine + torch.cat([-right, left], dim=-1) * sine

    logits = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / math.sqrt(query.shape[-1])
    chunk = torch.bucketize(torch.arange(length), seen["cu_seqlens"][1:], right=True)
    logits = logits.masked_fill(chunk[:, None] != chunk[None, :], -torch.inf)
    received = logits.softmax(-1).sum(dim=1).mean(dim=0)  # (n,), in the tower's order
    distances = torch.cdist(visual.patch_embed(patches), seen["first"])
    order = distances.argmin(dim=1)
    assert sorted(order.tolist()) == list(range(length))
    return received[order].view(-1, 4).mean(dim=1)


MIXED = [
    picture(1, (64, 64)),
    picture(2, (200, 90)),
    video(3, 5),
    picture(4, (31, 77)),
    picture(5, (640, 480)),
]


def prepared(tower, medium):
    if isinstance(medium, Video):
        return tower.prepare_video(medium.frames, medium.rate)
    return tower.prepare(medium)


def test_scores_of_a_mixed_batch_equal_eager_attention_of_each_alone(stock, tower):
    items = [prepared(tower, medium) for medium in MIXED]
    batch = tower.encode(items, {WINDOWED, OBJECT, DEEP}, [False] * len(items))
    for item, views in zip(items, batch, strict=True):
        assert [view.frame for view in views] == list(range(item.pixels.shape[0]))
        assert {view.grid for view in views} == {tuple(item.pixels.shape[1:3])}
        for layer in (WINDOWED, OBJECT, DEEP):
            scores = torch.cat([view.scores[layer] for view in views])
            torch.testing.assert_close(
                scores, eager_reference(stock, item.pixels, layer), rtol=1e-5, atol=1e-6
            )


def test_features_of_a_mixed_batch_are_stocks_of_each_alone(stock, tower):
    items = [prepared(tower, medium) for medium in MIXED]
    for item, views in zip(items, tower.encode(items, set(), [False] * len(items)), strict=True):
        slices, height, width = item.pixels.shape[:3]
        with torch.no_grad():
            output = stock.model.model.visual(
                item.pixels.flatten(0, 3), torch.tensor([(slices, 2 * height, 2 * width)])
            )
        features = torch.cat([view.features for view in views])
        torch.testing.assert_close(features, output.pooler_output, rtol=1e-4, atol=1e-5)


def test_batch_neighbours_change_nothing_that_matters(tower):
    items = [prepared(tower, medium) for medium in MIXED]
    batch = tower.encode(items, {OBJECT, DEEP}, [False] * len(items))
    for item, together in zip(items, batch, strict=True):
        (alone,) = tower.encode([item], {OBJECT, DEEP}, [False])
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one.features, other.features, rtol=1e-5, atol=1e-5)
            for layer in (OBJECT, DEEP):
                torch.testing.assert_close(one.scores[layer], other.scores[layer], rtol=1e-5, atol=0)


async def test_the_service_answers_with_what_the_tower_gives(stack, tower):
    film = video(3, 5)
    (expected,) = tower.encode([prepared(tower, film)], {OBJECT, DEEP}, [False])
    frames = media_pb2.Video(frames=map(png, film.frames), frames_per_second=film.rate)
    async with connect(stack.encoder_address) as channel:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        answer = await stub.EncodeImage(
            encoder_service_pb2.EncodeImageRequest(
                media=media_pb2.Media(video=frames), layers=[OBJECT, DEEP]
            ),
            timeout=30,
        )
    assert answer.layout.video
    assert answer.layout.seconds_per_slice == 1
    assert [view.frame for view in answer.views] == [0, 1, 2]
    for view, ours in zip(answer.views, expected, strict=True):
        assert (view.grid_height, view.grid_width) == ours.grid
        features = tensors.from_proto(view.features, field="features", shape=(None, 64))
        torch.testing.assert_close(features, ours.features, rtol=1e-4, atol=1e-5)
        for entry in view.attention:
            scores = tensors.from_proto(entry.scores, field="scores", shape=(None,))
            torch.testing.assert_close(scores, ours.scores[entry.layer], rtol=1e-5, atol=0)


# budgets


@pytest.mark.parametrize(
    ("budget", "of_a_slice"),
    [
        ({"keep_count": 10}, lambda tokens: 10 // 4),
        ({"keep_ratio": 1 / 3}, lambda tokens: round(tokens / 3)),
        ({}, lambda tokens: round(tokens / 3)),
    ],
    ids=["count", "ratio", "default"],
)
async def test_a_video_is_pruned_slice_by_slice_on_its_own_scores(client, tower, stock, budget, of_a_slice):
    film = WHOLE["video of 8"][0][1][0]
    pixels = prepared(tower, film).pixels
    scores = {layer: eager_reference(stock, pixels, layer) for layer in (OBJECT, DEEP)}
    report, _ = await ask(client, WHOLE["video of 8"], pb.PrunePolicy(**budget))
    (media,) = report.media
    assert len(media.views) == 4
    tokens = pixels.shape[1] * pixels.shape[2]
    keep = of_a_slice(tokens)
    for number, view in enumerate(media.views):
        own = slice(number * tokens, (number + 1) * tokens)
        expected = selection.hiprune_plus_plus(
            scores[OBJECT][own].numpy(),
            scores[DEEP][own].numpy(),
            None,
            width=view.grid_width,
            keep=keep,
            alpha=0.1,
        )
        assert len(view.kept_indices) == keep
        assert list(view.kept_indices) == expected.indices.tolist()
        assert view.frame == number
    assert media.summary.tokens_before == 4 * tokens


async def test_several_images_are_pruned_each_for_itself(client):
    turns = WHOLE["two images apart"]
    report, _ = await ask(client, turns, THIRD)
    images = [part for part in turns[0][1] if not isinstance(part, str)]
    for media, image in zip(report.media, images, strict=True):
        alone, _ = await ask(client, [user(image, "what is red ?")], THIRD)
        assert media.views == alone.media[0].views


# text guidance


async def test_text_guidance_is_the_cosine_with_the_mean_of_the_questions_embeddings(client, stock):
    image, question = picture(6, (200, 90)), "how many red shapes are there ?"
    policy = pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.5, beta=0.3, include_scores=True)
    report, completion = await ask(client, [user(image, question)], policy)
    ids = stock.tokenizer(question, add_special_tokens=False).input_ids
    inputs = stock.image_processor(images=image, return_tensors="pt")
    with torch.no_grad():
        vector = stock.model.get_input_embeddings().weight[ids].mean(dim=0)
        features = stock.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    (view,) = report.media[0].views
    similarity = tensors.from_proto(view.scores.similarity, field="similarity", shape=(len(features),))
    expected = torch.cosine_similarity(features, vector[None], dim=-1)
    torch.testing.assert_close(similarity, expected, rtol=1e-4, atol=1e-5)
    keep = round(0.5 * len(features))
    chosen = [
        index for index, kind in zip(view.kept_indices, view.kinds, strict=True) if kind == pb.TOKEN_KIND_TEXT
    ]
    assert len(view.kept_indices) == keep
    assert len(chosen) == round(0.3 * keep)
    others = set(range(len(features))) - set(view.kept_indices)
    assert min(expected[chosen]) >= max(expected[list(others)])
    assert "tiny-qwen" in report.media[0].summary.text_model
    assert list(completion.token_ids) == stock.masked_answer([user(image, question)], kept_of(report))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_question_is_read_from_a_sharded_checkpoint_of_each_layout(tmp_path, layout, dtype):
    path = make_qwen2_5_vl(tmp_path / "model", layout=layout, dtype=dtype, shards=4)
    key = {"hub": "model.embed_tokens.weight", "model": "model.language_model.embed_tokens.weight"}[layout]
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(path / index[key], "pt") as file:
        table = file.get_tensor(key).float()
    ids = AutoTokenizer.from_pretrained(path)("what is red ?", add_special_tokens=False).input_ids
    vector = LanguageSpace(open_checkpoint(str(path))).encode("what is red ?")
    torch.testing.assert_close(vector, table[ids].mean(dim=0))


# what is refused


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("visual.blocks.2.attn.qkv.bias", "vision tower"),
        ("visual.merger.mlp.0.weight", "vision tower"),
        ("model.layers.1.mlp.up_proj.weight", "language model"),
        ("lm_head.weight", "language model"),
    ],
)
async def test_a_missing_tensor_is_an_error_that_names_it(tmp_path, key, part):
    path = make_qwen2_5_vl(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights[key]
    save_file(weights, path / "model.safetensors")

    async def load() -> None:
        if part == "vision tower":
            load_tower(open_checkpoint(str(path)), None, torch.device("cpu"), torch.float32)
        else:
            await load_language_model(LlmSettings(model=str(path))).engine.start()

    with pytest.raises(CheckpointError) as refused:
        await load()
    name = key.removeprefix("visual.").removeprefix("model.")
    assert part in str(refused.value)
    assert name in str(refused.value)


def test_the_encoder_refuses_a_language_only_checkpoint_in_one_line(tmp_path):
    path = make_qwen2_5_vl(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    language = {key: value for key, value in weights.items() if not key.startswith("visual.")}
    save_file(language, path / "model.safetensors")
    command = [sys.executable, "-m", "services.encoder", "--model", path, "--listen", f"unix:{tmp_path}/e"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "language-only checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_facts_follow_the_paper_and_the_blocks_that_see_a_whole_image(tmp_path):
    def layers(depth, blocks):
        vision = {"depth": depth, "out_hidden_size": 64, "fullatt_block_indexes": blocks}
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "qwen2_5_vl", "vision_config": vision})
        )
        save_file({"visual.merger.ln_q.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        (tmp_path / "preprocessor_config.json").write_text("{}")
        facts = open_checkpoint(str(tmp_path)).facts
        return facts.object_layer, facts.deep_layer

    assert layers(32, [7, 15, 23, 31]) == (16, 32)
    assert layers(32, [4, 10, 20, 31]) == (11, 32)
    assert layers(8, [5, 7]) == (6, 8)
    with pytest.raises(CheckpointError, match="expected the last block, 31"):
        layers(32, [7, 15, 23])


async def test_an_image_too_long_for_its_width_is_refused_by_its_field(client):
    with pytest.raises(InvalidInput, match="200") as refused:
        await ask(client, [user("what", picture(1, (300, 1)))], THIRD)
    assert refused.value.field == "messages[0].parts[1].media.image"


def test_the_tower_refuses_what_stock_cannot_resize(tower):
    long = picture(1, (300, 1))
    with pytest.raises(InvalidInput, match="aspect ratio") as refused:
        tower.prepare(long)
    assert refused.value.field == "media.image"
    with pytest.raises(InvalidInput, match="aspect ratio") as refused:
        tower.prepare_video([long, long], 2.0)
    assert refused.value.field == "media.video.frames[0]"


def visual(grids, *, seconds=0.0, prefix=None, valid=None) -> VisualTokens:
    views = tuple(
        VisualView(torch.zeros(1, 64), torch.tensor([0]), grid, prefix=prefix, valid=valid) for grid in grids
    )
    layout = encoder_service_pb2.MediaLayout(video=seconds != 0, seconds_per_slice=seconds)
    return VisualTokens(views, layout, "media")


@pytest.fixture(scope="module")
def language(path):
    return load_language_model(LlmSettings(model=str(path)))


@pytest.mark.parametrize(
    ("media", "field"),
    [
        (visual([(2, 2), (2, 2)]), "media.views"),
        (visual([(2, 2), (2, 3)], seconds=1), "media.views[1].selection"),
        (visual([(2, 2)], seconds=-1), "media.layout.seconds_per_slice"),
        (visual([(2, 2)], seconds=math.inf), "media.layout.seconds_per_slice"),
        (visual([(2, 2)], seconds=math.nan), "media.layout.seconds_per_slice"),
        (visual([(2, 2)], prefix=torch.zeros(1, 64)), "media.views[0].prefix_features"),
        (visual([(2, 2)], valid=(0, 0, 1, 1)), "media.views[0].selection.valid"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_media_that_this_family_cannot_have_are_refused_by_field(language, media, field):
    with pytest.raises(InvalidInput) as refused:
        language.adapter.check(media)
    assert refused.value.field == field


def test_a_grid_of_millions_is_refused_before_it_is_counted_out(language):
    media = visual([(2000, 2000)])
    language.adapter.check(media)
    with pytest.raises(InvalidInput, match="4000003 tokens before pruning"):
        language.adapter.splice(
            [1, 2, language.adapter.image_token_id], torch.zeros(3, 64), [torch.zeros(1, 64)], [media]
        )


async def test_scores_of_a_layer_of_windows_can_be_asked_for(client, stock, tower):
    turns = WHOLE["200×90"]
    pixels = prepared(tower, turns[0][1][0]).pixels
    policy = pb.PrunePolicy(keep_ratio=1 / 3, object_layer=WINDOWED, include_scores=True)
    report, _ = await ask(client, turns, policy)
    (view,) = report.media[0].views
    scores = tensors.from_proto(view.scores.object, field="object", shape=(None,))
    torch.testing.assert_close(scores, eager_reference(stock, pixels, WINDOWED), rtol=1e-4, atol=1e-5)
