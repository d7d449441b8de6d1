"""Claims about the language-model service over real gRPC: the real engine, and a stand-in for the pruner."""

from __future__ import annotations

import asyncio
import io
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest
import torch
from PIL import Image

from hiprune import tensors
from hiprune.errors import (
    Exhausted,
    Expired,
    HipruneError,
    Internal,
    InvalidInput,
    Mismatch,
    NotFound,
    Unavailable,
    Unsupported,
    from_rpc,
)
from hiprune.server import RequestGate
from hiprune.v1 import llm_service_pb2 as pb
from hiprune.v1 import llm_service_pb2_grpc, pruner_service_pb2_grpc
from hiprune.v1 import pruner_service_pb2 as pruner_pb
from hiprune.v1.media_pb2 import Media, Video
from hiprune.v1.tensor_pb2 import DATA_TYPE_I32
from services.llm.process import LlmService
from services.llm.settings import Settings
from tests.tiny import make_llava

GRID, CHANNELS, CONTEXT = 8, 48, 512
SIDE = 64


@asynccontextmanager
async def serving(register: Callable[[grpc.aio.Server], None]) -> AsyncIterator[str]:
    """A gRPC server on a free port, with the interceptor that every service has."""
    gate = RequestGate(default_deadline_s=60)
    gate.open()
    server = grpc.aio.server(interceptors=[gate])
    register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


class StandInPruner(pruner_service_pb2_grpc.PrunerServiceServicer):
    """Keeps every fourth token of features made from the image's first pixel; does as it is told."""

    def __init__(self) -> None:
        self.requests: list[pruner_pb.PruneImageRequest] = []
        self.cancelled = 0
        self.before: Callable[[pruner_pb.PruneImageRequest], object] | None = None
        self.alter: Callable[[pruner_pb.PrunedMedia], None] | None = None
        self.digest = ""

    async def PruneImage(self, request, context):
        self.requests.append(request)
        try:
            if self.before is not None and (waiting := self.before(request)) is not None:
                await waiting
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        with Image.open(io.BytesIO(request.media.image)) as image:
            seed = image.convert("RGB").getpixel((0, 0))[0]
        media = pruned(seed=seed, digest=self.digest)
        if self.alter is not None:
            self.alter(media)
        return pruner_pb.PruneImageResponse(media=media, cache=pruner_pb.CACHE_STATUS_MISS)


def features_of(seed: int, kept: range = range(0, GRID * GRID, 4)) -> torch.Tensor:
    return torch.randn((len(kept), CHANNELS), generator=torch.Generator().manual_seed(seed))


def pruned(seed: int = 0, digest: str = "") -> pruner_pb.PrunedMedia:
    kept = range(0, GRID * GRID, 4)
    selection = pruner_pb.Selection(
        kept_indices=kept,
        kinds=[pruner_pb.TOKEN_KIND_CONTROL] * len(kept),
        grid_height=GRID,
        grid_width=GRID,
    )
    view = pruner_pb.PrunedView(selection=selection, features=tensors.to_proto(features_of(seed, kept)))
    return pruner_pb.PrunedMedia(views=[view], vision_digest=digest)


def picture(shade: int = 0) -> pb.Part:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (shade, 0, 0)).save(file, "PNG")
    return pb.Part(media=Media(image=file.getvalue()))


def words(text: str = "what is this ?") -> pb.Part:
    return pb.Part(text=text)


def user(*parts: pb.Part) -> pb.Message:
    return pb.Message(role=pb.ROLE_USER, parts=parts)


def assistant(text: str) -> pb.Message:
    return pb.Message(role=pb.ROLE_ASSISTANT, parts=[words(text)])


@dataclass
class House:
    """The service under test and how to talk to it."""

    service: LlmService
    pruner: StandInPruner
    channel: grpc.aio.Channel
    digest: str = field(default="")

    def __post_init__(self) -> None:
        self.language = llm_service_pb2_grpc.LanguageModelServiceStub(self.channel)
        self.front = llm_service_pb2_grpc.ImageQaServiceStub(self.channel)
        self.digest = self.service.loaded().checkpoint.vision_digest
        self.pruner.digest = self.digest

    def pruned(self, seed: int = 0) -> pb.Part:
        return pb.Part(pruned_media=pruned(seed, self.digest))

    async def generate(self, request: pb.GenerateTextRequest) -> list[pb.GenerateTextResponse]:
        return await collected(self.language.GenerateText(request, timeout=30), "llm")

    async def ask(self, *messages: pb.Message, within_s: float = 30, **fields) -> list[pb.AskImageResponse]:
        request = pb.AskImageRequest(messages=messages, **fields)
        return await collected(self.front.AskImage(request, timeout=within_s), "llm")


async def collected(call, peer: str) -> list:
    try:
        return [event async for event in call]
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, peer=peer) from error


@asynccontextmanager
async def opened(path, **settings) -> AsyncIterator[House]:
    stand_in = StandInPruner()

    def add_pruner(server: grpc.aio.Server) -> None:
        pruner_service_pb2_grpc.add_PrunerServiceServicer_to_server(stand_in, server)

    async with serving(add_pruner) as pruner_address:
        service = LlmService(Settings(**{"model": str(path), "pruner": pruner_address, **settings}))
        await service.start()
        async with serving(service.register) as address, grpc.aio.insecure_channel(address) as channel:
            yield House(service, stand_in, channel)
        await service.stop()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("models") / "tiny", seed=1, context=CONTEXT)


@pytest.fixture(scope="module")
async def shared(path):
    async with opened(path, max_messages=6, max_media=3, max_text_chars=3000, max_new_tokens=300) as house:
        yield house


@pytest.fixture
def house(shared) -> House:
    """The shared service, its stand-in pruner fresh."""
    shared.pruner.requests.clear()
    shared.pruner.before = shared.pruner.alter = None
    shared.pruner.cancelled = 0
    shared.pruner.digest = shared.digest
    return shared


def text_of(events) -> str:
    return "".join(event.delta.text for event in events)


async def refusal(awaitable) -> HipruneError:
    with pytest.raises(HipruneError) as refused:
        await awaitable
    return refused.value


# answers


async def test_pruned_media_and_a_question_give_deltas_then_the_completion(house):
    request = pb.GenerateTextRequest(
        messages=[user(house.pruned(), words())], sampling=pb.Sampling(max_tokens=8)
    )
    events = await house.generate(request)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["delta"] * (len(events) - 1) + ["completion"]
    assert all(event.delta.text for event in events[:-1])
    completion = events[-1].completion
    chat = house.service.loaded().chat
    assert text_of(events) == chat.backend.decode(list(completion.token_ids), skip_special_tokens=True)
    usage = completion.usage
    assert usage.completion_tokens == len(completion.token_ids) == 8
    assert (usage.visual_tokens_before, usage.visual_tokens_after) == (64, 16)
    assert usage.prefill_flops_before > usage.prefill_flops_after > 0
    assert completion.finish_reason == pb.FINISH_REASON_LENGTH
    assert [timing.stage for timing in completion.timings] == ["queue", "project", "prefill", "decode"]


async def test_the_front_door_reports_first_and_answers_as_generate_text_does(house):
    sampling = pb.Sampling(max_tokens=20)
    events = await house.ask(user(picture(3), words()), sampling=sampling)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["report"] + ["delta"] * (len(events) - 2) + ["completion"]
    (entry,) = events[0].report.media
    assert list(entry.views[0].kept_indices) == list(range(0, 64, 4))
    assert entry.cache == pruner_pb.CACHE_STATUS_MISS
    assert [timing.stage for timing in entry.timings] == ["prune"]
    direct = await house.generate(
        pb.GenerateTextRequest(messages=[user(house.pruned(3), words())], sampling=sampling)
    )
    assert events[-1].completion.token_ids == direct[-1].completion.token_ids
    assert text_of(events) == text_of(direct)


async def test_the_pruner_is_given_the_policy_and_the_words_of_the_pictures_turn(house):
    policy = pruner_pb.PrunePolicy(method=pruner_pb.METHOD_HIPRUNE_PLUS_PLUS, keep_count=16, alpha=0.0)
    await house.ask(
        user(picture(1), words("what is this ?")),
        assistant("a ring"),
        user(words("and that ?"), picture(2)),
        policy=policy,
        sampling=pb.Sampling(max_tokens=2),
    )
    asked = sorted(
        (request.question, request.policy.SerializeToString()) for request in house.pruner.requests
    )
    assert asked == [(words, policy.SerializeToString()) for words in ("and that ?", "what is this ?")]


async def test_each_picture_goes_where_it_stood(house):
    sampling = pb.Sampling(max_tokens=20)
    one = await house.ask(user(picture(1), picture(2), words()), sampling=sampling)
    other = await house.ask(user(picture(2), picture(1), words()), sampling=sampling)
    direct = await house.generate(
        pb.GenerateTextRequest(messages=[user(house.pruned(1), house.pruned(2), words())], sampling=sampling)
    )
    assert one[-1].completion.token_ids == direct[-1].completion.token_ids
    assert one[-1].completion.token_ids != other[-1].completion.token_ids


async def test_all_pictures_are_pruned_at_once(house):
    together = asyncio.Barrier(3)
    house.pruner.before = lambda _: asyncio.wait_for(together.wait(), 10)
    events = await house.ask(user(picture(1), picture(2), picture(3), words()))
    assert len(events[0].report.media) == 3


async def test_words_alone_need_no_pruner(path):
    async with opened(path, pruner="127.0.0.1:1") as house:
        events = await house.ask(user(words("hello ?")), sampling=pb.Sampling(max_tokens=5))
        assert events[0].WhichOneof("event") == "report"
        assert not events[0].report.media
        assert events[-1].completion.usage.completion_tokens == 5
        error = await refusal(house.ask(user(picture(), words())))
        assert isinstance(error, Unavailable)
        assert error.reason == "PRUNER_UNREACHABLE"
        assert await house.ask(user(words("hello ?")))


async def test_sampling_and_stop_strings_reach_the_engine(house):
    drawn = pb.Sampling(max_tokens=20, temperature=1.0, seed=5)
    first, again = [await house.ask(user(words()), sampling=drawn) for _ in range(2)]
    assert text_of(first) == text_of(again)
    stop = text_of(first).split()[4]
    drawn.stop.append(stop)
    stopped = await house.ask(user(words()), sampling=drawn)
    assert text_of(stopped) == text_of(first)[: text_of(first).index(stop)]
    assert stopped[-1].completion.finish_reason == pb.FINISH_REASON_STOP


async def test_the_model_served_may_be_named_and_says_what_it_is(house):
    described = await house.language.GetLanguageModel(pb.GetLanguageModelRequest())
    assert described.model == "tiny"
    assert described.engine == "transformers"
    assert described.context_length == CONTEXT
    assert described.fingerprint.family == "llava"
    assert described.fingerprint.vision_digest == house.digest
    assert described.fingerprint.hidden_size == CHANNELS
    assert await house.ask(user(words()), model="tiny", sampling=pb.Sampling(max_tokens=1))


# refusals


def with_view(change: Callable[[pruner_pb.PrunedView], object]) -> Callable[[pruner_pb.PrunedMedia], object]:
    return lambda media: change(media.views[0])


def set_features(values: torch.Tensor) -> Callable[[pruner_pb.PrunedMedia], object]:
    return with_view(lambda view: view.features.CopyFrom(tensors.to_proto(values)))


def set_indices(*indices: int) -> Callable[[pruner_pb.PrunedMedia], object]:
    def change(view: pruner_pb.PrunedView) -> None:
        del view.selection.kept_indices[:]
        view.selection.kept_indices.extend(indices)

    return with_view(change)


def poisoned(value: float) -> torch.Tensor:
    values = features_of(0)
    values[3, 5] = value
    return values


VIEW = "views[0]"
BROKEN_MEDIA = {
    "another tower's": (
        lambda media: setattr(media, "vision_digest", "f" * 64),
        Mismatch,
        "MODEL_MISMATCH",
        "vision_digest",
    ),
    "nobody's": (
        lambda media: media.ClearField("vision_digest"),
        Mismatch,
        "MODEL_MISMATCH",
        "vision_digest",
    ),
    "no views": (lambda media: media.ClearField("views"), InvalidInput, "INVALID_FIELD", "views"),
    "two views": (lambda media: media.views.append(media.views[0]), InvalidInput, "INVALID_FIELD", "views"),
    "no features": (
        with_view(lambda view: view.ClearField("features")),
        InvalidInput,
        "MISSING_FIELD",
        f"{VIEW}.features",
    ),
    "another width": (
        set_features(torch.zeros(16, CHANNELS + 1)),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.features.shape",
    ),
    "more rows than indices": (
        set_features(torch.zeros(17, CHANNELS)),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.features.shape",
    ),
    "rank 1": (
        set_features(torch.zeros(16 * CHANNELS)),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.features.shape",
    ),
    "whole numbers": (
        with_view(lambda view: setattr(view.features, "dtype", DATA_TYPE_I32)),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.features.dtype",
    ),
    "short data": (
        with_view(lambda view: setattr(view.features, "data", view.features.data[:-1])),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.features.data",
    ),
    "NaN": (set_features(poisoned(math.nan)), InvalidInput, "INVALID_FIELD", f"{VIEW}.features"),
    "infinity": (set_features(poisoned(math.inf)), InvalidInput, "INVALID_FIELD", f"{VIEW}.features"),
    "numbers that overflow": (
        set_features(features_of(0) * 1e38),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.features",
    ),
    "a token outside the grid": (
        with_view(lambda view: view.prefix_features.CopyFrom(tensors.to_proto(torch.zeros(1, CHANNELS)))),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.prefix_features",
    ),
    "no index": (set_indices(), InvalidInput, "INVALID_FIELD", f"{VIEW}.selection.kept_indices"),
    "indices out of order": (
        set_indices(5, 4),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.selection.kept_indices",
    ),
    "an index twice": (set_indices(4, 4), InvalidInput, "INVALID_FIELD", f"{VIEW}.selection.kept_indices"),
    "an index below the grid": (
        set_indices(-1, 4),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.selection.kept_indices",
    ),
    "an index above the grid": (
        set_indices(4, 64),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.selection.kept_indices",
    ),
    "another grid": (
        with_view(lambda view: setattr(view.selection, "grid_width", 9)),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.selection.grid_width",
    ),
    "no grid": (
        with_view(lambda view: view.ClearField("selection")),
        InvalidInput,
        "INVALID_FIELD",
        f"{VIEW}.selection.grid_height",
    ),
}


@pytest.mark.parametrize(("change", "kind", "reason", "place"), BROKEN_MEDIA.values(), ids=BROKEN_MEDIA)
async def test_broken_pruned_media_are_refused_by_code_reason_and_field(house, change, kind, reason, place):
    part = house.pruned()
    change(part.pruned_media)
    # not the first media, and not the first part
    request = pb.GenerateTextRequest(messages=[user(house.pruned(), words(), part)])
    error = await refusal(house.generate(request))
    assert (type(error), error.reason) == (kind, reason)
    assert error.field == f"messages[0].parts[2].pruned_media.{place}"
    assert await house.generate(
        pb.GenerateTextRequest(messages=[user(words())], sampling=pb.Sampling(max_tokens=1))
    )


async def test_a_mismatch_names_both_towers(house):
    part = house.pruned()
    part.pruned_media.vision_digest = "f" * 64
    error = await refusal(house.generate(pb.GenerateTextRequest(messages=[user(part)])))
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "f" * 12 in error.message
    assert house.digest[:12] in error.message
    assert "f" * 13 not in error.message


BAD_REQUESTS = {
    "no messages": ({}, InvalidInput, "MISSING_FIELD", "messages"),
    "no role": (
        {"messages": [pb.Message(parts=[words()])]},
        InvalidInput,
        "MISSING_FIELD",
        "messages[0].role",
    ),
    "a role from the future": (
        {"messages": [pb.Message(role=77, parts=[words()])]},
        InvalidInput,
        "INVALID_FIELD",
        "messages[0].role",
    ),
    "the model last": (
        {"messages": [user(words()), assistant("yes")]},
        InvalidInput,
        "INVALID_FIELD",
        "messages[1].role",
    ),
    "no parts": ({"messages": [user()]}, InvalidInput, "MISSING_FIELD", "messages[0].parts"),
    "an empty part": (
        {"messages": [user(words(), pb.Part())]},
        InvalidInput,
        "MISSING_FIELD",
        "messages[0].parts[1]",
    ),
    "too many messages": (
        {"messages": [user(words())] * 7},
        InvalidInput,
        "LIMIT_EXCEEDED",
        "messages",
    ),
    "too much text": (
        {"messages": [user(words("x" * 3001))]},
        InvalidInput,
        "LIMIT_EXCEEDED",
        "messages[0].parts[0].text",
    ),
    "a special token": (
        {"messages": [user(words("a </s> b"))]},
        InvalidInput,
        "RESERVED_TOKEN",
        "messages[0].parts[0].text",
    ),
    "more words than the context": (
        {"messages": [user(words("a " * 600))]},
        InvalidInput,
        "LIMIT_EXCEEDED",
        "messages",
    ),
    "an unknown model": (
        {"messages": [user(words())], "model": "gpt"},
        NotFound,
        "UNKNOWN_MODEL",
        "model",
    ),
    "no token": (
        {"messages": [user(words())], "sampling": pb.Sampling(max_tokens=0)},
        InvalidInput,
        "INVALID_FIELD",
        "sampling.max_tokens",
    ),
    "too many tokens": (
        {"messages": [user(words())], "sampling": pb.Sampling(max_tokens=301)},
        InvalidInput,
        "LIMIT_EXCEEDED",
        "sampling.max_tokens",
    ),
    "too hot": (
        {"messages": [user(words())], "sampling": pb.Sampling(temperature=2.5)},
        InvalidInput,
        "INVALID_FIELD",
        "sampling.temperature",
    ),
    "NaN": (
        {"messages": [user(words())], "sampling": pb.Sampling(temperature=math.nan)},
        InvalidInput,
        "INVALID_FIELD",
        "sampling.temperature",
    ),
    "an empty nucleus": (
        {"messages": [user(words())], "sampling": pb.Sampling(top_p=0)},
        InvalidInput,
        "INVALID_FIELD",
        "sampling.top_p",
    ),
    "an empty stop": (
        {"messages": [user(words())], "sampling": pb.Sampling(stop=["a", ""])},
        InvalidInput,
        "INVALID_FIELD",
        "sampling.stop[1]",
    ),
}


@pytest.mark.parametrize("method", ["GenerateText", "AskImage"])
@pytest.mark.parametrize(("fields", "kind", "reason", "place"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
async def test_a_bad_request_is_refused_by_code_reason_and_field(house, method, fields, kind, reason, place):
    if method == "GenerateText":
        error = await refusal(house.generate(pb.GenerateTextRequest(**fields)))
    else:
        rest = {name: value for name, value in fields.items() if name != "messages"}
        error = await refusal(house.ask(*fields.get("messages", ()), **rest))
    assert (type(error), error.reason, error.field) == (kind, reason, place)
    assert "expected" in error.message or kind is NotFound or reason == "RESERVED_TOKEN"


async def test_each_method_takes_media_of_its_own_kind(house):
    error = await refusal(house.generate(pb.GenerateTextRequest(messages=[user(words(), picture())])))
    assert (type(error), error.field) == (InvalidInput, "messages[0].parts[1].media")
    error = await refusal(house.ask(user(words(), house.pruned())))
    assert (type(error), error.field) == (InvalidInput, "messages[0].parts[1].pruned_media")
    error = await refusal(house.ask(user(words()), assistant("yes"), user(*[picture()] * 4)))
    assert (error.reason, error.field) == ("LIMIT_EXCEEDED", "messages[2].parts[3].media")
    video = pb.Part(media=Media(video=Video(frames=[b"pixels"])))
    error = await refusal(house.ask(user(video, words())))
    assert (type(error), error.field) == (Unsupported, "messages[0].parts[0].media.video")
    error = await refusal(house.ask(user(pb.Part(media=Media()), words())))
    assert (error.reason, error.field) == ("MISSING_FIELD", "messages[0].parts[0].media")
    assert not house.pruner.requests


@pytest.mark.parametrize(
    "fields",
    [{"model": "gpt"}, {"sampling": pb.Sampling(top_p=2)}, {"sampling": pb.Sampling(max_tokens=9999)}],
    ids=["model", "top_p", "max_tokens"],
)
async def test_everything_is_checked_before_a_picture_is_encoded(house, fields):
    await refusal(house.ask(user(picture(), words()), **fields))
    assert not house.pruner.requests


async def test_tokens_that_do_not_fit_the_context_are_refused_with_the_numbers(path, tmp_path):
    small = make_llava(tmp_path / "small", seed=1, context=32)
    async with opened(small) as house:
        error = await refusal(house.ask(user(picture(), picture(), words("a b"))))
        assert (type(error), error.reason, error.field) == (InvalidInput, "LIMIT_EXCEEDED", "messages")
        assert "context is 32" in error.message
        assert len(house.pruner.requests) == 2
        one = await house.ask(user(picture(), words("a")))
        usage = one[-1].completion.usage
        assert usage.prompt_tokens + usage.completion_tokens <= 32


# the pruner's errors, as the client's own


async def test_the_pruners_errors_name_the_clients_fields(house):
    def fail(error: HipruneError) -> None:
        def before(request: pruner_pb.PruneImageRequest) -> None:
            if request.media.image == picture(2).media.image:
                raise error

        house.pruner.before = before

    messages = [user(words(), picture(1), picture(2))]
    fail(InvalidInput("is not an image", reason="IMAGE_UNREADABLE", field="media.image"))
    error = await refusal(house.ask(*messages))
    assert (error.reason, error.field) == ("IMAGE_UNREADABLE", "messages[0].parts[2].media.image")
    assert error.message == "is not an image"
    fail(InvalidInput("is 2, expected at most 1", field="policy.alpha"))
    error = await refusal(house.ask(*messages))
    assert (type(error), error.field) == (InvalidInput, "policy.alpha")
    fail(InvalidInput("has too many words", reason="LIMIT_EXCEEDED", field="question"))
    assert (await refusal(house.ask(*messages))).field == "messages[0]"
    fail(Exhausted("the encoder is busy", retry_after_s=2.5))
    error = await refusal(house.ask(*messages))
    assert (type(error), error.reason, error.retry_after_s) == (Exhausted, "OVERLOADED", 2.5)
    assert await house.ask(user(picture(1), words()))


async def test_the_first_error_ends_the_other_pictures_work(house):
    def before(request: pruner_pb.PruneImageRequest):
        if request.media.image == picture(2).media.image:
            raise InvalidInput("is not an image", field="media.image")
        return asyncio.sleep(20)

    house.pruner.before = before
    error = await refusal(house.ask(user(picture(1), picture(2), words()), within_s=10))
    assert error.field == "messages[0].parts[1].media.image"
    await until(lambda: house.pruner.cancelled == 1)


async def test_a_pruner_of_another_model_is_a_mismatch_that_is_not_the_clients(house):
    house.pruner.digest = "e" * 64
    error = await refusal(house.ask(user(picture(), words())))
    assert (type(error), error.field) == (Mismatch, "")
    assert "the pruner serves another model" in error.message


async def test_a_pruner_that_sends_nonsense_is_an_internal_error(house):
    house.pruner.alter = set_features(poisoned(math.nan))
    error = await refusal(house.ask(user(picture(), words())))
    assert (type(error), error.field) == (Internal, "")


# slots, deadlines, leaving


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a condition of the service's, not ours to signal
            await asyncio.sleep(0.005)


async def test_a_slot_is_taken_before_a_picture_is_encoded_and_a_full_queue_is_refused(path):
    async with opened(path, max_concurrency=1, max_queue=1) as house:
        free = asyncio.Event()
        house.pruner.before = lambda _: free.wait()
        first = asyncio.create_task(house.ask(user(picture(1), words())))
        await until(lambda: len(house.pruner.requests) == 1)
        second = asyncio.create_task(house.ask(user(picture(2), words())))
        await until(lambda: house.service.loaded().slots.waiting == 1)
        error = await refusal(house.ask(user(words())))
        assert (type(error), error.reason) == (Exhausted, "OVERLOADED")
        assert error.retry_after_s == 1
        assert len(house.pruner.requests) == 1  # the second waits without any work
        free.set()
        assert await first
        assert await second
        assert await house.ask(user(words()))


async def test_a_waiting_request_that_leaves_makes_room_in_the_queue(path):
    async with opened(path, max_concurrency=1, max_queue=1) as house:
        free = asyncio.Event()
        house.pruner.before = lambda _: free.wait()
        first = asyncio.create_task(house.ask(user(picture(1), words())))
        await until(lambda: len(house.pruner.requests) == 1)
        waiting = house.front.AskImage(pb.AskImageRequest(messages=[user(words())]))
        reading = asyncio.create_task(waiting.read())
        await until(lambda: house.service.loaded().slots.waiting == 1)
        waiting.cancel()
        await until(lambda: house.service.loaded().slots.waiting == 0)
        reading.cancel()
        free.set()
        assert await first


async def test_leaving_in_the_middle_of_an_answer_frees_the_slot(path):
    async with opened(path, max_concurrency=1, max_queue=0) as house:
        model = house.service.loaded()
        model.engine._generation_config.eos_token_id = None
        sampling = pb.Sampling(max_tokens=480)
        call = house.front.AskImage(pb.AskImageRequest(messages=[user(words("hi"))], sampling=sampling))
        events = [await call.read() for _ in range(3)]
        assert events[-1].WhichOneof("event") == "delta"
        assert isinstance(await refusal(house.ask(user(words()))), Exhausted)
        call.cancel()
        await until(lambda: model.slots.running == 0)
        assert await house.ask(user(words()), sampling=pb.Sampling(max_tokens=2))


async def test_leaving_while_pictures_are_pruned_ends_the_pruners_work(house):
    house.pruner.before = lambda _: asyncio.sleep(20)
    call = house.front.AskImage(pb.AskImageRequest(messages=[user(picture(1), picture(2), words())]))
    reading = asyncio.create_task(call.read())
    await until(lambda: len(house.pruner.requests) == 2)
    call.cancel()
    await until(lambda: house.pruner.cancelled == 2)
    reading.cancel()


async def test_a_deadline_that_passes_ends_the_answer_and_the_service_lives_on(house):
    house.pruner.before = lambda _: asyncio.sleep(20)
    error = await refusal(house.ask(user(picture(), words()), within_s=0.3))
    assert isinstance(error, Expired)
    await until(lambda: house.pruner.cancelled == 1)
    house.pruner.before = None
    assert await house.ask(user(picture(), words()))


async def test_concurrent_answers_are_the_same_as_alone(house):
    async def one(seed: int) -> str:
        sampling = pb.Sampling(max_tokens=15, temperature=1.0, seed=seed)
        return text_of(await house.ask(user(picture(seed), words()), sampling=sampling))

    alone = [await one(seed) for seed in range(8)]
    assert await asyncio.gather(*(one(seed) for seed in range(8))) == alone


# the process


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "does-not-exist"], "does-not-exist"),
        (["--max-queue", "-1"], "max_queue"),
        (["--listen", "0.0.0.0:0"], "allow_anonymous"),
        (["--engine", "magic"], "engine"),
    ],
    ids=["model", "queue", "listen", "engine"],
)
def test_a_wrong_setting_ends_the_process_with_one_line(arguments, says):
    command = [sys.executable, "-m", "services.llm", "--listen", "unix:/tmp/never-ready.sock", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("hiprune llm: ")
    assert says in ended.stderr.splitlines()[-1]
