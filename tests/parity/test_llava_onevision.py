"""LLaVA-OneVision through three real services: stock token for token, and pruned what the method says."""

from __future__ import annotations

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from hiprune import tensors
from hiprune.calls import connect
from hiprune.checkpoints import image_processor_settings, open_checkpoint, read_json, text_digest
from hiprune.errors import Mismatch, Unsupported, from_rpc
from hiprune.stack import Stack
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2
from hiprune.v1.pruner_service_pb2 import (
    METHOD_HIPRUNE,
    METHOD_HIPRUNE_PLUS_PLUS,
    METHOD_NONE,
    METHOD_RANDOM,
    METHOD_STRIDED,
    TOKEN_KIND_TEXT,
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
from tests.tiny_anyres import ONEVISION_MAX_TILES, PATCH, SIDE, make_llava_onevision

LAYERS, OBJECT_LAYER = 5, 2  # the middle, halves to the even number; the feature is the last layer's
EVERYTHING = [PrunePolicy(method=METHOD_NONE), PrunePolicy(method=METHOD_HIPRUNE, keep_ratio=1)]
# width, height: square, wide, tall, one tile's, one pixel; from 120 × 120 on, grids that stock shrinks
SIZES = [
    (64, 64), (32, 32), (100, 40), (40, 100), (10, 10), (7, 90), (90, 7), (33, 64), (64, 33), (300, 300),
    (640, 120), (120, 640), (50, 70), (95, 33), (31, 97), (128, 64), (77, 31), (63, 65), (1, 1), (3, 200),
    (120, 120), (128, 96),
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llava_onevision(tmp_path_factory.mktemp("llava_onevision") / "model", seed=1)


class ImagesOnly(LlavaOnevisionProcessor):
    """The stock processor without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


@pytest.fixture(scope="module")
def stock(path):
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    settings = image_processor_settings(path)
    settings.pop("image_processor_type")
    processor = ImagesOnly(
        LlavaOnevisionImageProcessorPil(**settings),
        AutoTokenizer.from_pretrained(path),
        chat_template=(path / "chat_template.jinja").read_text("utf-8"),
        **{
            key: value
            for key, value in read_json(path / "processor_config.json").items()
            if key != "processor_class"
        },
    )
    with one_thread():
        yield Stock(model, processor, leading=0, feature=-1)


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
    return load_tower(open_checkpoint(str(path)), None, torch.device("cpu"), torch.float32)


# everything kept


@pytest.mark.parametrize("policy", EVERYTHING, ids=["none", "hiprune ratio 1"])
async def test_keeping_every_token_answers_as_stock_at_any_size(channel, stock, policy):
    answers, shrunk = set(), 0
    for seed, size in enumerate(SIZES):
        turns, pictures = [user("", WORDS[seed % len(WORDS)])], [picture(*size, seed)]
        ours = await ask(channel, request(turns, pictures, policy))
        assert ours.tokens == stock.answer(turns, pictures), size
        usage = ours.completion.usage
        shrunk += usage.visual_tokens_after < usage.visual_tokens_before
        answers.add(tuple(ours.tokens))
    assert len(answers) > len(SIZES) / 2  # the pictures and the words matter
    assert shrunk > 1  # and the largest grids were made smaller, as stock does


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
    PrunePolicy(method=METHOD_HIPRUNE, keep_count=40),
    PrunePolicy(method=METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.5),
    PrunePolicy(method=METHOD_RANDOM, keep_ratio=0.4),
    PrunePolicy(method=METHOD_STRIDED, keep_count=29),
]


@pytest.mark.parametrize("policy", PRUNED, ids=["ratio", "count", "text", "random", "strided"])
async def test_a_pruned_picture_is_answered_as_by_stock_on_the_spliced_rows(channel, stock, policy):
    for seed, size in enumerate(SIZES[::3]):
        turns, shown = [user("", WORDS[seed % len(WORDS)])], picture(*size, seed)
        ours = await ask(channel, request(turns, [shown], policy))
        (kept,) = ours.kept()
        (media,) = ours.report.media
        if media.summary.tokens_kept < media.summary.tokens_before:
            assert ours.tokens == stock.spliced_answer(turns, [stock.kept_rows(shown, kept)]), size
        else:  # a small picture, of which a count keeps all
            assert policy.keep_count
            assert ours.tokens == stock.answer(turns, [shown])


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
            whole = [
                view.valid.height * view.valid.width if number else SIDE**2
                for number, view in enumerate(media.views)
            ]
            asked = policy.keep_count or max(1, round(sum(whole) / 3))
            share = max(1, asked // len(whole))
            assert media.summary.tokens_before == sum(whole)
            if asked < sum(whole):
                assert [len(view.kept_indices) for view in media.views] == [min(share, n) for n in whole]
            else:
                assert [len(view.kept_indices) for view in media.views] == whole
            for view, padding in zip(media.views, stock.all_padding(shown, PATCH), strict=True):
                assert padding.isdisjoint(view.kept_indices), size


async def test_a_pruned_large_grid_is_not_shrunk(channel, stock):
    turns, shown = [user("", "what is this ?")], picture(300, 300, 5)
    policy = PrunePolicy(method=METHOD_RANDOM, keep_ratio=0.9)
    ours = await ask(channel, request(turns, [shown], policy))
    (kept,) = ours.kept()
    assert len(kept) - 1 > 1.1**2 * ONEVISION_MAX_TILES
    assert ours.completion.usage.visual_tokens_after == sum(map(len, kept))
    assert ours.tokens == stock.spliced_answer(turns, [stock.kept_rows(shown, kept)])


# scores


async def test_scores_in_the_report_equal_eager_attention(channel, stock):
    policy = PrunePolicy(method=METHOD_HIPRUNE, keep_count=40, include_scores=True)
    for size in [(64, 64), (100, 40), (33, 97)]:
        shown = picture(*size)
        (media,) = (await ask(channel, request([user("", "what is this ?")], [shown], policy))).report.media
        _, scores = stock.encoded(shown)
        assert len(media.views) == len(scores[0])
        assert media.summary.policy.object_layer == OBJECT_LAYER
        assert media.summary.deep_layer == LAYERS
        for number, view in enumerate(media.views):
            for message, layer in ((view.scores.object, OBJECT_LAYER), (view.scores.deep, LAYERS)):
                ours = tensors.from_proto(message, field="scores", shape=(SIDE**2,))
                torch.testing.assert_close(ours, scores[layer - 1][number], rtol=1e-5, atol=0)


def test_features_and_scores_of_a_mixed_batch_are_each_pictures_own(tower, stock):
    pictures = [picture(*size, seed) for seed, size in enumerate([(300, 90), (32, 32), (64, 64), (40, 100)])]
    items = [tower.prepare(each) for each in pictures]
    layers = set(range(1, LAYERS + 1))
    together = tower.encode(items, layers, [True, False, True, False])
    assert len({len(views) for views in together}) > 1
    for place, (shown, item, views) in enumerate(zip(pictures, items, together, strict=True)):
        assert torch.equal(item.pixels, stock.pixels(shown))
        features, scores = stock.encoded(shown)
        (alone,) = tower.encode([item], layers, [True])
        for number, view in enumerate(views):
            torch.testing.assert_close(view.features, features[number], rtol=1e-4, atol=1e-5)
            for layer in layers:
                torch.testing.assert_close(view.scores[layer], scores[layer - 1][number], rtol=1e-5, atol=0)
                torch.testing.assert_close(view.scores[layer], alone[number].scores[layer], rtol=1e-5, atol=0)
            assert (view.aligned is None) == (place % 2 == 1)
            assert not view.cls_scores  # there is no CLS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_holds_the_same_model(tmp_path, path, tower, layout):
    checkpoint = open_checkpoint(str(make_llava_onevision(tmp_path / "model", seed=1, layout=layout)))
    known = open_checkpoint(str(path))
    assert checkpoint.vision_digest == known.vision_digest
    assert text_digest(checkpoint, None) == text_digest(known, None)
    item = tower.prepare(picture(100, 40))
    other = load_tower(checkpoint, None, torch.device("cpu"), torch.float32)
    ((ours, *_),), ((theirs, *_),) = tower.encode([item], {1}, [True]), other.encode([item], {1}, [True])
    assert torch.equal(ours.features, theirs.features)
    assert torch.equal(ours.aligned, theirs.aligned)
    rows = [
        load(Settings(model=str(each.path))).adapter.project(visual_tokens(ours))
        for each in (checkpoint, known)
    ]
    assert torch.equal(*rows)


def test_another_projector_is_another_tower(tmp_path, path):
    """The encoder projects for text guidance, so what it sends depends on the projector as well."""
    other = make_llava_onevision(tmp_path / "model", seed=1)
    weights = load_file(other / "model.safetensors")
    weights["multi_modal_projector.linear_2.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(other)).vision_digest != open_checkpoint(str(path)).vision_digest


# text


@torch.no_grad()
def similarity(stock, shown, question: str) -> torch.Tensor:
    """(V, N): cosine of each projected token with the mean of the words' input embeddings."""
    ids = stock.processor.tokenizer(question, add_special_tokens=False)["input_ids"]
    wanted = stock.model.get_input_embeddings().weight[ids].mean(dim=0)
    rows = stock.model.model.multi_modal_projector(stock.encoded(shown)[0])
    return torch.nn.functional.cosine_similarity(rows, wanted, dim=-1)


async def test_text_guidance_compares_in_the_language_models_space(channel, stock):
    policy = PrunePolicy(method=METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.5, beta=0.5, include_scores=True)
    shown, question = picture(100, 40), "is there a red star ?"
    (media,) = (await ask(channel, request([user("", question)], [shown], policy))).report.media
    expected = similarity(stock, shown, question)
    assert media.summary.text_model == "model: input embeddings"
    assert len(media.views) == len(expected)
    for number, view in enumerate(media.views):
        ours = tensors.from_proto(view.scores.similarity, field="similarity", shape=(SIDE**2,))
        torch.testing.assert_close(ours, expected[number], rtol=0, atol=1e-3)
        chosen = [index for index, kind in zip(view.kept_indices, view.kinds, strict=True)
                  if kind == TOKEN_KIND_TEXT]  # fmt: skip
        assert chosen
        valid = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        region = view.valid
        valid[region.top : region.top + region.height, region.left : region.left + region.width] = True
        valid |= number == 0
        left = set(valid.flatten().nonzero().flatten().tolist()) - set(view.kept_indices)
        assert all(ours[index] >= max((ours[each] for each in left), default=-1) for index in chosen)


# what is refused


async def test_video_is_refused(services):
    async with connect(services.encoder_address) as channel:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        video = media_pb2.Media(video=media_pb2.Video(frames=[encoded(picture(32, 32))] * 2))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.EncodeImage(encoder_service_pb2.EncodeImageRequest(media=video), timeout=30)
    error = from_rpc(raised.value, peer="encoder")
    assert (error.code.name, error.field) == ("UNIMPLEMENTED", "media.video")


async def test_a_question_about_a_video_is_refused(channel):
    asked = request([user("", "what is this ?")], [picture(32, 32)], EVERYTHING[0])
    media = asked.messages[0].parts[0].media
    media.video.frames.append(media.image)
    with pytest.raises(Unsupported) as refused:
        await ask(channel, asked)
    assert (refused.value.code.name, refused.value.field) == (
        "UNIMPLEMENTED",
        "messages[0].parts[0].media.video",
    )


async def test_a_fine_tune_with_the_same_shapes_is_refused(tmp_path, services, serve):
    other = make_llava_onevision(tmp_path / "fine_tune", seed=2)
    service = LlmService(Settings(model=str(other), pruner=services.pruner_address))
    await service.start()
    channel = await serve(service.register)
    with pytest.raises(Mismatch) as refused:
        await ask(channel, request([user("", "what is this ?")], [picture(64, 64)], EVERYTHING[0]))
    assert (refused.value.code.name, refused.value.reason) == ("FAILED_PRECONDITION", "MODEL_MISMATCH")
    await service.stop()
