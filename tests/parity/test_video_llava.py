"""Video-LLaVA against stock transformers: every token kept is its answer, pruned ones are what they say.

One random model in three real services; the reference is `tests.tiny_video_llava.Stock`.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from hiprune import tensors
from hiprune.calls import connect
from hiprune.checkpoints import open_checkpoint
from hiprune.client import Client, question_message, video
from hiprune.errors import HipruneError, from_rpc
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2, llm_service_pb2_grpc, pruner_service_pb2, pruner_service_pb2_grpc
from services.encoder.families import load_tower
from services.pruner import selection
from tests.tiny import LAYOUTS
from tests.tiny_video_llava import ANSWER_TOKENS, PATCHES, SAMPLED, Stock, make_video_llava, media_of

SIDE, OBJECT, DEEP = 4, 3, 7  # a 4×4 grid; layer 3 of 8 is CLIP-L's 9 of 24
QUESTION = "what colour is the circle left of the star ?"
NONE, HIPRUNE = pruner_service_pb2.METHOD_NONE, pruner_service_pb2.METHOD_HIPRUNE
PLUS_PLUS = pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS
Policy = pruner_service_pb2.PrunePolicy
SAMPLING = llm_service_pb2.Sampling(max_tokens=ANSWER_TOKENS)


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Coloured shapes on noise, as a PNG."""
    draw = np.random.default_rng(seed)
    image = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        box = np.sort(draw.uniform(0, 1, (2, 2)), axis=0) * size
        pen.ellipse(box.ravel().tolist(), fill=tuple(draw.integers(0, 256, 3).tolist()))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def clip_of(count: int, seed: int, size: tuple[int, int] = (48, 40)):
    return video([picture(1000 * seed + number, size) for number in range(count)])


def said(words: str) -> llm_service_pb2.Message:
    return llm_service_pb2.Message(
        role=llm_service_pb2.ROLE_ASSISTANT, parts=[llm_service_pb2.Part(text=words)]
    )


def asked(*media, words: str = QUESTION) -> llm_service_pb2.Message:
    return question_message(words, media)


IMAGE_SIZES = [(32, 32), (200, 90), (31, 77), (640, 480), (33, 31), (5, 120), (96, 96)]
CASES = {
    **{f"an image of {size}": [asked(picture(n, size))] for n, size in enumerate(IMAGE_SIZES)},
    **{f"{count} frames": [asked(clip_of(count, count))] for count in SAMPLED},
    "wide frames": [asked(clip_of(8, 31, (120, 35)))],
    "tall frames": [asked(clip_of(8, 32, (30, 90)), words="count the shapes .")],
    "frames of the tower's own size": [asked(clip_of(8, 33, (32, 32)), words="is there a star ?")],
    "two images": [asked(picture(40), picture(41, (20, 70)))],
    "three images": [asked(picture(42), picture(43), picture(44), words="count the shapes .")],
    "an image and a video": [asked(picture(45, (70, 40)), clip_of(8, 46))],
    "an image and a short video": [asked(picture(47), clip_of(3, 48), words="is there a star ?")],
    "two videos": [asked(clip_of(8, 49), clip_of(20, 50))],
    "two turns about an image": [asked(picture(51)), said("a red ring"), asked(words="and the star ?")],
    "two turns about a video": [asked(clip_of(8, 52)), said("yes"), asked(words="count the shapes .")],
    "a video, then an image": [asked(clip_of(8, 53)), said("a star"), asked(picture(54))],
    "words alone": [asked()],
    "words alone, two turns": [asked(words="is there a star ?"), said("no"), asked(words="what colour ?")],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, here or in the services."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_video_llava(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="module")
def stock(path) -> Stock:
    return Stock(path)


@pytest.fixture(scope="module")
def tower(path):
    return load_tower(open_checkpoint(str(path)), None, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def running(path):
    threads = {f"HIPRUNE_{service}_THREADS": "1" for service in ("ENCODER", "PRUNER", "LLM")}
    with Stack(model=str(path), redis=False, environ=threads) as stack:
        yield stack


@pytest.fixture
async def client(running):
    async with Client(running.address) as connected:
        yield connected


async def ask(client: Client, messages, **policy):
    """The report and the completion."""
    request = llm_service_pb2.AskImageRequest(messages=messages, policy=Policy(**policy), sampling=SAMPLING)
    events = [event async for event in client.ask_stream(request)]
    return events[0].report, events[-1].completion


# the stock model's tokens


@pytest.mark.parametrize("name", CASES)
async def test_every_token_kept_is_answered_as_by_the_stock_model(client, stock, name):
    expected = stock.answer(CASES[name])
    for policy in ({"method": NONE}, {"method": HIPRUNE, "keep_ratio": 1.0}):
        _, completion = await ask(client, CASES[name], **policy)
        assert list(completion.token_ids) == expected
        assert completion.usage.visual_tokens_after == completion.usage.visual_tokens_before


def test_there_are_twenty_inputs_and_their_answers_differ(stock):
    answers = {tuple(stock.answer(messages)) for messages in CASES.values()}
    assert len(CASES) >= 20
    assert len(answers) > len(CASES) * 0.8


@pytest.mark.parametrize(
    "name",
    ["an image of (200, 90)", "8 frames", "3 frames", "20 frames", "an image and a video", "two videos"],
)
async def test_pruned_is_the_stock_language_model_on_the_kept_rows(client, stock, name):
    messages = CASES[name]
    for policy in ({"keep_ratio": 1 / 3}, {"keep_count": 24}):
        report, completion = await ask(client, messages, method=HIPRUNE, **policy)
        assert list(completion.token_ids) == stock.pruned_answer(messages, report)
        if "keep_ratio" in policy:  # or a service that prunes nothing would pass
            assert list(completion.token_ids) != stock.answer(messages)


# budgets


@pytest.mark.parametrize(
    ("policy", "a_frame"),
    [({"keep_count": 40}, 5), ({"keep_count": 47}, 5), ({"keep_count": 16}, 2), ({"keep_ratio": 1 / 3}, 5)],
)
@pytest.mark.parametrize("method", [HIPRUNE, PLUS_PLUS, pruner_service_pb2.METHOD_RANDOM])
async def test_each_frame_keeps_its_share_of_the_budget_and_its_cls_is_counted(
    client, method, policy, a_frame
):
    report, completion = await ask(client, CASES["8 frames"], method=method, **policy)
    (media,) = report.media
    assert [view.frame for view in media.views] == list(range(8))
    assert [1 + len(view.kept_indices) for view in media.views] == [a_frame] * 8
    assert media.summary.tokens_before == 8 * (PATCHES + 1)
    assert media.summary.tokens_kept == completion.usage.visual_tokens_after == 8 * a_frame


async def test_an_image_keeps_the_budget_in_its_grid_alone(client):
    report, completion = await ask(client, CASES["an image of (640, 480)"], method=HIPRUNE, keep_count=5)
    (media,) = report.media
    assert [len(view.kept_indices) for view in media.views] == [5]
    assert (media.summary.tokens_before, completion.usage.visual_tokens_after) == (PATCHES, 5)


async def test_a_budget_without_a_token_beside_each_cls_is_refused(client):
    with pytest.raises(HipruneError) as raised:
        await ask(client, CASES["8 frames"], method=HIPRUNE, keep_count=15)
    assert (raised.value.code.name, raised.value.field) == ("INVALID_ARGUMENT", "policy.keep_count")


@pytest.mark.parametrize("name", ["8 frames", "an image of (31, 77)"])
async def test_kept_tokens_are_hiprunes_choice_by_the_eager_scores(client, stock, name):
    count, in_grid = (64, 8 - 1) if "frames" in name else (7, 7)
    # alpha for one anchor a view
    report, _ = await ask(client, CASES[name], method=HIPRUNE, keep_count=count, alpha=0.7)
    _, scores, _ = stock.tower(media_of(CASES[name])[0])
    for number, view in enumerate(report.media[0].views):
        layers = [scores[layer][number].numpy() for layer in (OBJECT, DEEP)]
        expected = selection.hiprune(*layers, width=SIDE, keep=in_grid, alpha=0.7)
        assert list(view.kept_indices) == expected.indices.tolist()
        assert list(view.kinds) == expected.kinds.tolist()


# the towers


def prepared(tower, media):
    opened = [
        Image.open(io.BytesIO(data)).convert("RGB")
        for data in ([media.image] if media.HasField("image") else media.video.frames)
    ]
    return tower.prepare(opened[0]) if media.HasField("image") else tower.prepare_video(opened, 2.0)


def test_features_and_scores_equal_the_eager_towers_in_a_batch_of_images_and_videos(stock, tower):
    names = ["8 frames", "an image of (200, 90)", "an image and a video", "3 frames"]
    media = [each for name in names for each in media_of(CASES[name])]
    items = [prepared(tower, each) for each in media]
    together = tower.encode(items, set(range(1, DEEP + 1)), [False] * len(items))
    for each, item, views in zip(media, items, together, strict=True):
        features, scores, from_cls = stock.tower(each)
        is_video = each.HasField("video")
        assert len(views) == (8 if is_video else 1)
        (alone,) = tower.encode([item], {OBJECT, DEEP}, [False])
        for number, view in enumerate(views):
            torch.testing.assert_close(view.features, features[number, 1:], rtol=1e-4, atol=1e-5)
            assert (view.prefix is not None) == is_video
            if view.prefix is not None:
                torch.testing.assert_close(view.prefix, features[number, :1], rtol=1e-4, atol=1e-5)
            for layer in range(1, DEEP + 1):
                torch.testing.assert_close(view.scores[layer], scores[layer][number], rtol=1e-5, atol=0)
                row = from_cls[layer][number]
                torch.testing.assert_close(view.cls_scores[layer], row, rtol=1e-5, atol=1e-7)
            for layer in (OBJECT, DEEP):
                torch.testing.assert_close(view.scores[layer], alone[number].scores[layer], rtol=1e-5, atol=0)


def test_the_layers_behind_the_feature_layer_are_not_loaded(tower):
    for each in (tower.image_tower, tower.video_tower):
        names = [name.split(".") for name, _ in each.named_parameters()]
        layers = {int(name[name.index("layers") + 1]) for name in names if "layers" in name}
        assert layers == set(range(DEEP))


def test_every_key_layout_is_one_model(tmp_path):
    paths = [make_video_llava(tmp_path / layout, seed=3, layout=layout) for layout in LAYOUTS]
    checkpoints = [open_checkpoint(str(each)) for each in paths]
    assert len({each.vision_digest for each in checkpoints}) == 1
    found = []
    for each in checkpoints:
        towers = load_tower(each, None, torch.device("cpu"), torch.float32)
        items = [prepared(towers, media) for media in media_of(CASES["an image and a video"])]
        found.append([view for views in towers.encode(items, {DEEP}, [True, True]) for view in views])
    for others in found[1:]:
        for view, other in zip(found[0], others, strict=True):
            assert torch.equal(view.features, other.features)
            assert torch.equal(view.aligned, other.aligned)
    assert all(view.aligned.dtype == torch.float16 for view in found[0])
    lengths = torch.stack([view.aligned.float().norm(dim=-1) for view in found[0]])
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=2e-3)


def test_the_digest_covers_both_towers_and_tells_them_apart(path, tmp_path):
    weights = load_file(path / "model.safetensors")
    key = "vision_model.pre_layrnorm.weight"
    image, clip = f"image_tower.{key}", f"video_tower.{key}"
    changed = {
        "as it is": {},
        "images": {image: weights[image] + 1},
        "frames": {clip: weights[clip] + 1},
        "exchanged": {image: weights[clip], clip: weights[image]},
    }
    digests = set()
    for name, tensors_ in changed.items():
        (tmp_path / name).mkdir()
        for file in ("config.json", "preprocessor_config.json", "processor_config.json"):
            (tmp_path / name / file).write_bytes((path / file).read_bytes())
        save_file(weights | tensors_, tmp_path / name / "model.safetensors")
        digests.add(open_checkpoint(str(tmp_path / name)).vision_digest)
    assert len(digests) == len(changed)


# the question


@pytest.mark.parametrize("name", ["8 frames", "an image of (200, 90)"])
async def test_similarity_is_of_projected_tokens_with_the_questions_mean_embedding(client, stock, path, name):
    keep = 80 if name == "8 frames" else 10
    report, _ = await ask(
        client, CASES[name], method=PLUS_PLUS, keep_count=keep, beta=0.4, include_scores=True
    )
    (media,) = report.media
    ids = stock.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        question = stock.model.get_input_embeddings()(torch.tensor(ids)).mean(dim=0)
        rows = stock.model.model.multi_modal_projector(stock.tower(media_of(CASES[name])[0])[0][:, 1:])
    expected = torch.cosine_similarity(rows, question[None, None], dim=-1)  # (V, N)
    assert media.summary.text_model == f"{path.name}: input embeddings"
    for number, view in enumerate(media.views):
        found = tensors.from_proto(view.scores.similarity, field="similarity", shape=(PATCHES,))
        torch.testing.assert_close(found, expected[number], rtol=0, atol=1e-3)  # tokens travel as float16
        kinds = dict(zip(view.kept_indices, view.kinds, strict=True))
        by_text = [index for index, kind in kinds.items() if kind == pruner_service_pb2.TOKEN_KIND_TEXT]
        assert len(by_text) == 4  # round(0.4 × 9) beside a CLS, round(0.4 × 10) without
        dropped = [index for index in range(PATCHES) if index not in kinds]
        assert found[by_text].min() >= found[dropped].max()


# what is refused


@pytest.mark.parametrize(
    ("frames", "field"),
    [
        ([picture(1), picture(2), picture(3, (40, 40))], "video.frames[2]"),
        ([], "video.frames"),
        ([picture(1, (8, 8))] * 65, "video.frames"),
        ([picture(1), b"GIF89a"], "video.frames[1]"),
    ],
    ids=["unequal sizes", "no frame", "too many", "no image"],
)
async def test_frames_that_make_no_video_are_refused_by_name(client, frames, field):
    with pytest.raises(HipruneError) as raised:
        await client.ask(QUESTION, video(frames), policy=Policy(method=HIPRUNE))
    assert raised.value.code.name == "INVALID_ARGUMENT"
    assert raised.value.field == f"messages[0].parts[0].media.{field}"


async def pruned_video(running, **policy) -> pruner_service_pb2.PrunedMedia:
    async with connect(running.pruner_address) as channel:
        stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
        request = pruner_service_pb2.PruneImageRequest(media=clip_of(20, 20), policy=Policy(**policy))
        return (await stub.PruneImage(request, timeout=60)).media


async def generated(address: str, media) -> list[int]:
    message = question_message(QUESTION, [])
    message.parts.insert(0, llm_service_pb2.Part(pruned_media=media))
    request = llm_service_pb2.GenerateTextRequest(messages=[message], sampling=SAMPLING)
    async with connect(address) as channel:
        stub = llm_service_pb2_grpc.LanguageModelServiceStub(channel)
        try:
            events = [event async for event in stub.GenerateText(request, timeout=60)]
        except Exception as error:
            raise from_rpc(error, peer="llm") from error
    return list(events[-1].completion.token_ids)


async def test_a_pruned_video_says_which_frames_it_is_of_and_generates_as_asked(running, client):
    media = await pruned_video(running, method=HIPRUNE, keep_count=40)
    assert media.layout.video
    assert list(media.layout.sampled_frames) == SAMPLED[20]
    _, completion = await ask(client, CASES["20 frames"], method=HIPRUNE, keep_count=40)
    assert await generated(running.address, media) == list(completion.token_ids)


async def test_a_video_without_a_frame_or_a_cls_is_refused(running):
    for damage, field in (
        (lambda media: media.views.pop(), "views"),
        (lambda media: media.views[3].ClearField("prefix_features"), "views[3].prefix_features"),
        (lambda media: media.layout.ClearField("video"), "views"),
    ):
        media = await pruned_video(running, method=HIPRUNE, keep_count=40)
        damage(media)
        with pytest.raises(HipruneError) as raised:
            await generated(running.address, media)
        assert raised.value.code.name == "INVALID_ARGUMENT"
        assert raised.value.field == f"messages[0].parts[0].pruned_media.{field}"


async def test_a_fine_tune_of_the_same_shapes_is_another_model(running, tmp_path):
    other = Stack(
        model=str(make_video_llava(tmp_path / "tuned", seed=2)),
        redis=False,
        environ={"HIPRUNE_LLM_PRUNER": running.pruner_address},
    )
    try:
        other.start_service("llm")
        other.wait_ready("llm")
        async with Client(other.address) as client:
            for name in ("8 frames", "an image of (32, 32)"):
                with pytest.raises(HipruneError) as raised:
                    await ask(client, CASES[name], method=HIPRUNE)
                assert (raised.value.code.name, raised.value.reason) == (
                    "FAILED_PRECONDITION",
                    "MODEL_MISMATCH",
                )
        with pytest.raises(HipruneError) as raised:
            await generated(other.address, await pruned_video(running, method=NONE))
        assert (raised.value.code.name, raised.value.reason) == ("FAILED_PRECONDITION", "MODEL_MISMATCH")
    finally:
        other.stop()
