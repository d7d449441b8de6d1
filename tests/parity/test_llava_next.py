"""LLaVA-NeXT through three real services: stock token for token, and pruned what the method says."""

from __future__ import annotations

import random

import grpc
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from hiprune import tensors
from hiprune.anyres import best_resolution, tiling
from hiprune.calls import connect
from hiprune.checkpoints import image_processor_settings, locate_paired, open_checkpoint, read_json
from hiprune.config import ConfigError
from hiprune.errors import Mismatch, from_rpc
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2 as pb
from hiprune.v1 import llm_service_pb2_grpc, pruner_service_pb2_grpc
from hiprune.v1.media_pb2 import Media
from hiprune.v1.pruner_service_pb2 import (
    METHOD_HIPRUNE,
    METHOD_HIPRUNE_PLUS_PLUS,
    METHOD_NONE,
    METHOD_RANDOM,
    METHOD_STRIDED,
    PruneImageRequest,
    PrunePolicy,
)
from services.encoder.families import load_tower
from services.llm.process import LlmService, load
from services.llm.settings import Settings
from tests.anyres import (
    ONE_THREAD,
    WORDS,
    Stock,
    ask,
    assistant,
    encoded,
    one_thread,
    picture,
    request,
    user,
    visual_tokens,
)
from tests.tiny import LAYOUTS
from tests.tiny_anyres import NEXT_PINPOINTS, PATCH, SIDE, TILE, make_clip, make_llava_next

OBJECT_LAYER, DEEP_LAYER = 2, 3  # of 4
EVERYTHING = [PrunePolicy(method=METHOD_NONE), PrunePolicy(method=METHOD_HIPRUNE, keep_ratio=1)]
# width, height: square, wide, tall, one pixel, a single tile's, above the largest canvas, nothing but padding
SIZES = [
    (64, 64), (32, 32), (100, 40), (40, 100), (10, 10), (7, 90), (90, 7), (33, 64), (64, 33), (300, 300),
    (640, 120), (120, 640), (50, 70), (95, 33), (31, 97), (128, 64), (77, 31), (63, 65), (1, 1), (3, 200),
    (200, 3), (96, 32),
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_next")
    make_clip(folder / "clip")
    return make_llava_next(folder / "model", seed=1)


@pytest.fixture(scope="module")
def stock(path):
    model = LlavaNextForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    settings = image_processor_settings(path)
    settings.pop("image_processor_type")
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**settings),
        AutoTokenizer.from_pretrained(path),
        chat_template=(path / "chat_template.jinja").read_text("utf-8"),
        **{
            key: value
            for key, value in read_json(path / "processor_config.json").items()
            if key != "processor_class"
        },
    )
    with one_thread():
        yield Stock(model, processor, leading=1, feature=-2)


@pytest.fixture(scope="module")
def services(path):
    with Stack(model=str(path), redis=False, environ=ONE_THREAD) as running:
        yield running


@pytest.fixture(scope="module")
async def channel(services):
    async with connect(services.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def tower(path):
    checkpoint = open_checkpoint(str(path))
    return load_tower(checkpoint, locate_paired("", checkpoint), torch.device("cpu"), torch.float32)


# everything kept


@pytest.mark.parametrize("policy", EVERYTHING, ids=["none", "hiprune ratio 1"])
async def test_keeping_every_token_answers_as_stock_at_any_size(channel, stock, policy):
    answers = set()
    for seed, size in enumerate(SIZES):
        turns, pictures = [user("", WORDS[seed % len(WORDS)])], [picture(*size, seed)]
        ours = await ask(channel, request(turns, pictures, policy))
        assert ours.tokens == stock.answer(turns, pictures), size
        usage = ours.completion.usage
        assert usage.visual_tokens_after == usage.visual_tokens_before
        assert usage.prefill_flops_after == usage.prefill_flops_before
        answers.add(tuple(ours.tokens))
    assert len(answers) > len(SIZES) / 2  # the pictures and the words matter


@pytest.mark.parametrize("policy", EVERYTHING, ids=["none", "hiprune ratio 1"])
async def test_conversations_are_answered_as_by_stock(channel, stock, policy):
    wide, tall, square = picture(100, 40, 1), picture(30, 90, 2), picture(70, 70, 3)
    conversations = [
        ([user("", "", "which is red ?")], [wide, tall]),
        ([user("", "what is this ?"), assistant("a star"), user("and the colour ?")], [tall]),
        ([user("", "what is this ?"), assistant("a ring"), user("", "and this ?")], [square, wide]),
        ([user("hello , what do you see ?")], []),
    ]
    for turns, pictures in conversations:
        ours = await ask(channel, request(turns, pictures, policy))
        assert ours.tokens == stock.answer(turns, pictures)


# pruned


PRUNED = [
    PrunePolicy(method=METHOD_HIPRUNE, keep_ratio=1 / 3),
    PrunePolicy(method=METHOD_HIPRUNE, keep_count=20),
    PrunePolicy(method=METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.5),
    PrunePolicy(method=METHOD_RANDOM, keep_ratio=0.4),
    PrunePolicy(method=METHOD_STRIDED, keep_count=17),
]


@pytest.mark.parametrize("policy", PRUNED, ids=["ratio", "count", "text", "random", "strided"])
async def test_a_pruned_picture_is_answered_as_by_stock_on_the_spliced_rows(channel, stock, policy):
    for seed, size in enumerate(SIZES[::3]):
        turns, shown = [user("", WORDS[seed % len(WORDS)])], picture(*size, seed)
        ours = await ask(channel, request(turns, [shown], policy))
        (kept,) = ours.kept()
        assert ours.tokens == stock.spliced_answer(turns, [stock.kept_rows(shown, kept)]), size


async def test_two_pruned_pictures_in_a_conversation_are_spliced_each_in_its_place(channel, stock):
    turns = [user("", "what is this ?", ""), assistant("a ring"), user("count the shapes .")]
    pictures = [picture(100, 40, 1), picture(30, 90, 2)]
    ours = await ask(channel, request(turns, pictures, PRUNED[0]))
    pieces = [stock.kept_rows(shown, kept) for shown, kept in zip(pictures, ours.kept(), strict=True)]
    assert ours.tokens == stock.spliced_answer(turns, pieces)


async def test_each_view_keeps_its_equal_share_and_nothing_of_the_padding(channel, stock):
    for size in SIZES:
        shown = picture(*size)
        turns = [user("", "what is this ?")]
        for policy in (PRUNED[0], PRUNED[1]):
            (media,) = (await ask(channel, request(turns, [shown], policy))).report.media
            whole = [view.valid.height * view.valid.width if number else SIDE**2
                     for number, view in enumerate(media.views)]  # fmt: skip
            asked = policy.keep_count or max(1, round(sum(whole) / 3))
            share = max(1, asked // len(whole))
            assert media.summary.tokens_before == sum(whole)
            assert media.summary.tokens_requested == asked
            if asked < sum(whole):
                assert [len(view.kept_indices) for view in media.views] == [min(share, n) for n in whole]
            for view, padding in zip(media.views, stock.all_padding(shown, PATCH), strict=True):
                assert padding.isdisjoint(view.kept_indices), size


async def test_newlines_end_the_rows_that_keep_a_token_where_they_are_asked_for(path, services, stock, serve):
    service = LlmService(Settings(model=str(path), pruner=services.pruner_address, newlines="rows"))
    await service.start()
    channel = await serve(service.register)
    for seed, size in enumerate([(64, 64), (100, 40), (30, 95), (3, 200)]):
        turns, shown = [user("", WORDS[seed])], picture(*size, seed)
        for policy in (PRUNED[0], PRUNED[3]):
            ours = await ask(channel, request(turns, [shown], policy))
            (kept,) = ours.kept()
            columns = tiling(size[1], size[0], NEXT_PINPOINTS, tile=TILE, side=SIDE).columns
            rows = stock.kept_rows_with_newlines(shown, kept, columns, SIDE)
            assert ours.tokens == stock.spliced_answer(turns, [rows]), size
            assert ours.completion.usage.visual_tokens_after == sum(map(len, kept))
        whole = await ask(channel, request(turns, [shown], EVERYTHING[0]))
        assert whole.tokens == stock.answer(turns, [shown])
    await service.stop()


# scores


async def test_scores_in_the_report_equal_eager_attention(channel, stock):
    policy = PrunePolicy(method=METHOD_HIPRUNE, keep_count=20, include_scores=True)
    for size in [(64, 64), (100, 40), (33, 97)]:
        shown = picture(*size)
        (media,) = (await ask(channel, request([user("", "what is this ?")], [shown], policy))).report.media
        _, scores = stock.encoded(shown)
        assert len(media.views) == len(scores[0])
        for number, view in enumerate(media.views):
            for message, layer in ((view.scores.object, OBJECT_LAYER), (view.scores.deep, DEEP_LAYER)):
                ours = tensors.from_proto(message, field="scores", shape=(SIDE**2,))
                torch.testing.assert_close(ours, scores[layer - 1][number], rtol=1e-5, atol=0)


def test_features_and_scores_of_a_mixed_batch_are_each_pictures_own(tower, stock):
    pictures = [picture(*size, seed) for seed, size in enumerate([(300, 90), (32, 32), (64, 64), (40, 100)])]
    items = [tower.prepare(each) for each in pictures]
    together = tower.encode(items, {1, OBJECT_LAYER, DEEP_LAYER}, [True, False, True, False])
    assert len({len(views) for views in together}) > 1
    for place, (shown, item, views) in enumerate(zip(pictures, items, together, strict=True)):
        assert torch.equal(item.pixels, stock.pixels(shown))
        features, scores = stock.encoded(shown)
        (alone,) = tower.encode([item], {1, OBJECT_LAYER, DEEP_LAYER}, [True])
        for number, view in enumerate(views):
            torch.testing.assert_close(view.features, features[number], rtol=1e-4, atol=1e-5)
            for layer in (1, OBJECT_LAYER, DEEP_LAYER):
                torch.testing.assert_close(view.scores[layer], scores[layer - 1][number], rtol=1e-5, atol=0)
                torch.testing.assert_close(view.scores[layer], alone[number].scores[layer], rtol=1e-5, atol=0)
                from_cls = stock.from_cls(shown)[layer - 1][number]
                torch.testing.assert_close(view.cls_scores[layer], from_cls, rtol=1e-5, atol=1e-7)
            assert (view.aligned is None) == (place % 2 == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_holds_the_same_model(tmp_path, path, tower, layout):
    checkpoint = open_checkpoint(str(make_llava_next(tmp_path / "model", seed=1, layout=layout)))
    known = open_checkpoint(str(path))
    assert checkpoint.vision_digest == known.vision_digest
    item = tower.prepare(picture(100, 40))
    other = load_tower(checkpoint, None, torch.device("cpu"), torch.float32)
    ((ours, *_),), ((theirs, *_),) = tower.encode([item], {1}, [False]), other.encode([item], {1}, [False])
    assert torch.equal(ours.features, theirs.features)
    rows = [
        load(Settings(model=str(each.path))).adapter.project(visual_tokens(ours))
        for each in (checkpoint, known)
    ]
    assert len(rows[0]) == SIDE**2 + 1  # a base view alone, whole: one newline behind it
    assert torch.equal(*rows)


def test_nothing_behind_the_feature_layer_is_loaded(tower):
    layers = {int(name.split("layers.")[1].split(".")[0]) for name, _ in tower.model.named_parameters()
              if "layers." in name}  # fmt: skip
    assert layers == set(range(DEEP_LAYER))


# text


@torch.no_grad()
def similarity(stock, path, shown, question: str) -> torch.Tensor:
    """(V, N): CLIP's own cosine of each token with the question."""
    clip = CLIPModel.from_pretrained(path.parent / "clip", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(path)(question, add_special_tokens=False)["input_ids"]
    pooled = clip.text_model(input_ids=torch.tensor([[1, *ids, 3]])).pooler_output
    wanted = torch.nn.functional.normalize(clip.text_projection(pooled)[0], dim=0)
    rows = clip.visual_projection(clip.vision_model.post_layernorm(stock.encoded(shown)[0]))
    return torch.nn.functional.normalize(rows, dim=-1) @ wanted


async def test_text_guidance_compares_with_the_paired_clip(channel, path, stock):
    policy = PrunePolicy(method=METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.5, include_scores=True)
    shown, question = picture(100, 40), "is there a red star ?"
    (media,) = (await ask(channel, request([user("", question)], [shown], policy))).report.media
    expected = similarity(stock, path, shown, question)
    assert media.summary.text_model == "clip"
    assert len(media.views) == len(expected)
    for number, view in enumerate(media.views):
        ours = tensors.from_proto(view.scores.similarity, field="similarity", shape=(SIDE**2,))
        torch.testing.assert_close(ours, expected[number], rtol=0, atol=1e-3)


# what is refused


async def test_a_fine_tune_with_the_same_shapes_is_refused(tmp_path, services, serve):
    other = make_llava_next(tmp_path / "fine_tune", seed=2)
    service = LlmService(Settings(model=str(other), pruner=services.pruner_address))
    await service.start()
    channel = await serve(service.register)
    with pytest.raises(Mismatch) as refused:
        await ask(channel, request([user("", "what is this ?")], [picture(64, 64)], EVERYTHING[0]))
    assert (refused.value.code.name, refused.value.reason) == ("FAILED_PRECONDITION", "MODEL_MISMATCH")
    await service.stop()


def test_a_family_without_a_newline_embedding_refuses_the_setting():
    with pytest.raises(ConfigError, match=r"newlines.*rows.*llava family has none"):
        load(Settings(newlines="rows"))


def no_tile(media):
    del media.views[-1]


def other_size(media):
    media.layout.original_width = 640


def no_size(media):
    media.layout.original_height = 0


def more_shown(media):
    media.views[1].selection.valid.height -= 1


def prefixed(media):
    media.views[1].prefix_features.CopyFrom(media.views[1].features)


@pytest.mark.parametrize(
    ("alter", "field"),
    [
        (no_tile, "views"),
        (other_size, "layout.tile_rows"),
        (no_size, "layout.original_height"),
        (more_shown, "views[1].selection.valid"),
        (prefixed, "views[1].prefix_features"),
    ],
)
async def test_views_that_are_not_those_of_the_image_are_refused(services, channel, alter, field):
    async with connect(services.pruner_address) as pruner:
        asked = PruneImageRequest(media=Media(image=encoded(picture(100, 100))), policy=PRUNED[0])
        answer = await pruner_service_pb2_grpc.PrunerServiceStub(pruner).PruneImage(asked, timeout=60)
    alter(answer.media)
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(pruned_media=answer.media), pb.Part(text="?")])
    stub = llm_service_pb2_grpc.LanguageModelServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in stub.GenerateText(pb.GenerateTextRequest(messages=[message]), timeout=60):
            pass
    error = from_rpc(raised.value, peer="llm")
    assert (error.code.name, error.field) == (
        "INVALID_ARGUMENT",
        f"messages[0].parts[0].pruned_media.{field}",
    )


# geometry


def test_the_geometry_is_transformers_own_at_any_size():
    draw = random.Random(0)
    real = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    many = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    for pinpoints, tile, side in ((NEXT_PINPOINTS, TILE, SIDE), (real, 336, 24), (many, 384, 27)):
        for _ in range(700):
            height, width = (max(1, round(10 ** draw.uniform(0, 3.7))) for _ in range(2))
            tiles = tiling(height, width, pinpoints, tile=tile, side=side)
            assert (tiles.rows, tiles.columns) == get_anyres_image_grid_shape(
                (height, width), pinpoints, tile
            )
            grid = torch.arange(tiles.rows * tiles.columns * side**2)
            grid = grid.view(1, tiles.rows * side, tiles.columns * side)
            stocks = unpad_image(grid, (height, width))[0]
            top, left, rows, columns = tiles.shown
            assert torch.equal(grid[0, top : top + rows, left : left + columns], stocks)
            assert sum(region[2] * region[3] for region in tiles.valid) == stocks.numel()
            shown = set(stocks.flatten().tolist())
            for number, (y, x, h, w) in enumerate(tiles.valid):
                row, column = divmod(number, tiles.columns)
                part = grid[0, row * side + y : row * side + y + h, column * side + x : column * side + x + w]
                assert shown.issuperset(part.flatten().tolist())
            assert list(best_resolution(height, width, pinpoints)) in pinpoints
