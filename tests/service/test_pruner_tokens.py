"""Claims about the pruner over real gRPC: anybody's tokens, bad input, an encoder that is away or wrong."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from hiprune import tensors
from hiprune.checkpoints import Checkpoint, digest_of_all, open_checkpoint
from hiprune.errors import (
    HipruneError,
    Internal,
    InvalidInput,
    Mismatch,
    Unavailable,
    from_rpc,
)
from hiprune.server import RequestGate
from hiprune.v1 import encoder_service_pb2 as encoder_pb
from hiprune.v1 import encoder_service_pb2_grpc, media_pb2, pruner_service_pb2_grpc, tensor_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from services.pruner.methods import divprune
from services.pruner.process import PrunerService
from services.pruner.settings import Settings
from services.pruner.text import PairedTextEncoder
from tests.stacks import FACTS, THIRD, TOKENS

GOLDEN = Path(__file__).parents[1] / "golden"
METHODS = {name.removeprefix("METHOD_"): value for name, value in pb.Method.items() if value}
SIDE, N, D, A = math.isqrt(TOKENS), TOKENS, 6, 128
QUESTION = "which shape is blue ?"


# --- one pruner, real but for its encoder ---------------------------------------------------------


class Encoder(encoder_service_pb2_grpc.EncoderServiceServicer):
    """A stand-in for the encoder: right answers out of the air, each as a test has bent it."""

    def __init__(self, checkpoint: Checkpoint, paired: Path) -> None:
        facts = checkpoint.facts
        self.fingerprint = encoder_pb.ModelFingerprint(
            family=facts.family,
            vision_digest=checkpoint.vision_digest,
            preprocessing_digest=checkpoint.preprocessing_digest,
            dtype=tensor_pb2.DATA_TYPE_F16,
            hidden_size=facts.hidden_size,
            layers=facts.layers,
            paired_digest=digest_of_all(paired),
        )
        self.calls: list[encoder_pb.EncodeImageRequest] = []
        self.bend: Callable[[encoder_pb.EncodeImageResponse], object] = lambda response: None
        self.called = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def EncodeImage(self, request, context):
        self.calls.append(request)
        self.called.set()
        await self.go_on.wait()
        draw = np.random.default_rng(list(request.media.image))
        view = encoder_pb.View(grid_height=SIDE, grid_width=SIDE, features=half(draw.normal(size=(N, D))))
        if request.aligned:
            view.aligned.CopyFrom(half(draw.normal(size=(N, A))))
        for layer in request.layers:
            scores = draw.random(N)
            view.attention.add(layer=layer, scores=single(scores), cls_scores=single(scores[::-1]))
        response = encoder_pb.EncodeImageResponse(views=[view], fingerprint=self.fingerprint)
        self.bend(response)
        return response

    def register(self, server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)


def half(values: np.ndarray) -> tensor_pb2.Tensor:
    return tensors.to_proto(torch.from_numpy(np.asarray(values)).half())


def single(values) -> tensor_pb2.Tensor:
    return tensors.to_proto(torch.from_numpy(np.asarray(values, dtype=np.float32)))


class Serving:
    """A server of this process, and a channel to it."""

    def __init__(self, register) -> None:
        gate = RequestGate(60)
        gate.open()
        self.server = grpc.aio.server(
            interceptors=[gate], options=[("grpc.max_receive_message_length", 2**28)]
        )
        register(self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def __aenter__(self) -> grpc.aio.Channel:
        await self.server.start()
        options = [("grpc.max_receive_message_length", 2**28), ("grpc.max_send_message_length", 2**28)]
        self.channel = grpc.aio.insecure_channel(self.address, options=options)
        return self.channel

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.stop(None)


async def started(encoder_address: str, model: Path, **settings: object) -> PrunerService:
    service = PrunerService(Settings(encoder=encoder_address, model=str(model), **settings))
    await service.start()
    return service


@pytest.fixture(scope="session")
async def alone(model):
    """A pruner whose encoder is nowhere: PruneTokens needs none."""
    service = await started("unix:/nonexistent/encoder.sock", model)
    async with Serving(service.register) as channel:
        yield pruner_service_pb2_grpc.PrunerServiceStub(channel)
    await service.stop()


@pytest.fixture
async def encoder(model):
    return Encoder(open_checkpoint(str(model)), model.parent / "clip")


@pytest.fixture
async def pruner(encoder, model):
    """A pruner with the stand-in for its encoder, and an empty cache."""
    serving = Serving(encoder.register)
    async with serving:
        service = await started(
            serving.address, model, max_image_bytes=1000, max_frames=3, max_video_bytes=2000
        )
        async with Serving(service.register) as channel:
            yield pruner_service_pb2_grpc.PrunerServiceStub(channel)
        await service.stop()


@pytest.fixture(scope="session")
async def digest(alone) -> str:
    return (await alone.GetPruner(pb.GetPrunerRequest())).fingerprint.vision_digest


async def error_of(answer) -> HipruneError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(answer, 30)
    return from_rpc(caught.value, peer="pruner")


# --- requests -------------------------------------------------------------------------------------


def view(height: int = 4, width: int = 4, layers=(1, 2), seed: int = 0, **fields) -> encoder_pb.View:
    draw = np.random.default_rng(seed)
    attention = [
        encoder_pb.LayerAttention(layer=layer, scores=single(draw.random(max(0, height * width))))
        for layer in layers
    ]
    return encoder_pb.View(grid_height=height, grid_width=width, attention=attention, **fields)


def request(*views: encoder_pb.View, method: str = "HIPRUNE", **fields) -> pb.PruneTokensRequest:
    names = pb.PruneTokensRequest.DESCRIPTOR.fields_by_name
    own = {name: fields.pop(name) for name in list(fields) if name in names and name != "policy"}
    return pb.PruneTokensRequest(
        views=views or [view()], policy=pb.PrunePolicy(method=METHODS.get(method, 0), **fields), **own
    )


def indices(response, number: int = 0) -> list[int]:
    return list(response.views[number].selection.kept_indices)


def kinds(response, number: int = 0) -> list[str]:
    return [pb.TokenKind.Name(k).removeprefix("TOKEN_KIND_") for k in response.views[number].selection.kinds]


def by_text(response, number: int = 0) -> list[int]:
    return [
        i
        for i, kind in zip(indices(response, number), kinds(response, number), strict=True)
        if kind == "TEXT"
    ]


# --- anybody's tokens -----------------------------------------------------------------------------


def golden_cases() -> list:
    found = []
    for name in ("fixed_grid", "dynamic_grid"):
        with np.load(GOLDEN / f"{name}.npz") as file:
            for case in sorted({key.split("_")[0] for key in file.files}):
                parts = [file[f"{case}_{part}"] for part in ("params", "object", "deep", "mask")]
                found.append(pytest.param(*parts, id=f"{name}-{case}"))
    return found


@pytest.mark.parametrize(("params", "object_scores", "deep_scores", "mask"), golden_cases())
async def test_the_authors_own_answers_come_over_the_wire(params, object_scores, deep_scores, mask, alone):
    height, width, keep, alpha = int(params[0]), int(params[1]), int(params[2]), float(params[3])
    views = [
        encoder_pb.View(
            grid_height=height,
            grid_width=width,
            attention=[
                encoder_pb.LayerAttention(layer=9, scores=single(middle)),
                encoder_pb.LayerAttention(layer=23, scores=single(deep)),
            ],
        )
        for middle, deep in zip(object_scores, deep_scores, strict=True)
    ]
    answer = await alone.PruneTokens(request(*views, keep_count=keep * len(views), alpha=alpha))
    for number, expected in enumerate(mask):
        assert indices(answer, number) == np.flatnonzero(expected).tolist()
    assert (answer.summary.policy.object_layer, answer.summary.deep_layer) == (9, 23)


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_keeps_what_it_says_of_the_callers_features(method, alone):
    features = torch.randn(16, 5).bfloat16()
    tokens = view(features=tensors.to_proto(features))
    answer = await alone.PruneTokens(request(tokens, method=method, keep_count=6, include_scores=True))
    kept = indices(answer)
    assert len(kept) == (16 if method == "NONE" else 6)
    assert kept == sorted(set(kept))
    found = tensors.from_proto(answer.views[0].features, field="x", shape=(None, 5))
    assert torch.equal(found, features[kept])
    assert answer.summary.tokens_kept == answer.summary.tokens_requested == len(kept)
    assert answer.summary.policy.method == METHODS[method]
    assert [timing.stage for timing in answer.timings] == ["select"]
    guided = {"ANCHOR", "BUFFER", "REGISTER"}
    expected = {
        **{"HIPRUNE": guided, "HIPRUNE_PLUS_PLUS": guided},
        **{"VISIONZIP": {"DOMINANT"}, "DIVPRUNE": {"DIVERSE"}},
    }
    assert set(kinds(answer)) <= expected.get(method, {"CONTROL"})


async def test_visionzip_takes_attention_from_cls_where_the_caller_brings_it(alone):
    tokens = view()
    tokens.attention[1].cls_scores.CopyFrom(single(range(16)))
    answer = await alone.PruneTokens(request(tokens, method="VISIONZIP", keep_count=3))
    assert indices(answer) == [13, 14, 15]
    tokens.attention[1].ClearField("cls_scores")
    tokens.attention[1].scores.CopyFrom(single(range(16, 0, -1)))
    answer = await alone.PruneTokens(request(tokens, method="VISIONZIP", keep_count=3))
    assert indices(answer) == [0, 1, 2]


async def test_random_is_the_same_for_the_same_tokens_and_another_for_others(alone):
    async def drawn(seed: int) -> list[int]:
        return indices(
            await alone.PruneTokens(request(view(9, 9, seed=seed), method="RANDOM", keep_count=20))
        )

    assert await drawn(1) == await drawn(1) != await drawn(2)


async def test_an_unset_policy_is_hiprune_at_a_third(alone):
    answer = await alone.PruneTokens(pb.PruneTokensRequest(views=[view(6, 6)]))
    assert len(indices(answer)) == 12
    assert answer.summary.policy.method == pb.METHOD_HIPRUNE
    assert answer.summary.policy.keep_ratio == 1 / 3


async def test_the_layers_default_to_the_lowest_and_the_highest_that_came(alone):
    answer = await alone.PruneTokens(request(view(layers=(7, 3, 11)), keep_count=4))
    assert (answer.summary.policy.object_layer, answer.summary.deep_layer) == (3, 11)
    answer = await alone.PruneTokens(request(view(layers=(7, 3, 11)), keep_count=4, deep_layer=7))
    assert (answer.summary.policy.object_layer, answer.summary.deep_layer) == (3, 7)
    answer = await alone.PruneTokens(request(view(layers=(7, 3, 11)), keep_count=4, object_layer=7))
    assert (answer.summary.policy.object_layer, answer.summary.deep_layer) == (7, 11)


# --- text guidance --------------------------------------------------------------------------------


def plus_plus(*views, **fields) -> pb.PruneTokensRequest:
    return request(*views, method="HIPRUNE_PLUS_PLUS", keep_count=8, beta=0.25, include_scores=True, **fields)


def scores_of(answer, number: int = 0) -> list[float]:
    message = answer.views[number].selection.scores.similarity
    return tensors.from_proto(message, field="x", shape=(None,)).tolist()


async def test_a_text_vector_is_compared_with_the_aligned_tokens_else_with_the_features(alone):
    aligned = torch.zeros(16, 3)
    aligned[[2, 11]] = torch.tensor([0.0, 5.0, 0.0])
    features = torch.zeros(16, 3)
    features[[4, 13]] = torch.tensor([0.0, 5.0, 0.0])
    features_only = view(features=tensors.to_proto(features))
    both = view(features=tensors.to_proto(features), aligned=tensors.to_proto(aligned))
    for vector in (
        torch.tensor([0.0, 0.1, 0.0]),
        torch.tensor([[0.0, 7.0, 0.0]]),
        torch.tensor([0.0, 1, 0]).half(),
    ):
        answer = await alone.PruneTokens(plus_plus(both, text_vector=tensors.to_proto(vector)))
        assert [i for i, score in enumerate(scores_of(answer)) if score > 0.99] == [2, 11]
        assert set(indices(answer)) >= {2, 11}
        answer = await alone.PruneTokens(plus_plus(features_only, text_vector=tensors.to_proto(vector)))
        assert [i for i, score in enumerate(scores_of(answer)) if score > 0.99] == [4, 13]
        assert len(indices(answer)) == 8
        assert answer.summary.text_model == "the caller's text vector"


async def test_where_one_view_has_no_aligned_tokens_all_are_compared_by_their_features(alone):
    features = tensors.to_proto(torch.eye(16)[:, :3].contiguous())
    views = [view(features=features, aligned=tensors.to_proto(torch.zeros(16, 3))), view(features=features)]
    vector = tensors.to_proto(torch.tensor([1.0, 0.0, 0.0]))
    answer = await alone.PruneTokens(plus_plus(*views, text_vector=vector))
    assert scores_of(answer, 0) == scores_of(answer, 1) == [1.0] + [0.0] * 15


async def test_a_similarity_is_used_as_it_is(alone):
    likeness = np.arange(16)[::-1] * 10.0 - 80  # not a cosine, and below 0 too
    similarity = pb.SimilarityScores(views=[single(likeness)])
    answer = await alone.PruneTokens(plus_plus(similarity=similarity))
    assert scores_of(answer) == likeness.tolist()
    left = [i for i in range(16) if i not in set(indices(answer)) - set(by_text(answer))]
    assert by_text(answer) == left[:2]
    assert answer.summary.text_model == "the caller's similarity"


async def test_a_question_is_read_by_the_pruners_own_text_model(alone, digest, model):
    vector = PairedTextEncoder(model.parent / "clip").encode(QUESTION)
    aligned = torch.randn(16, A, generator=torch.Generator().manual_seed(1))
    aligned[[3, 12]] = vector * 4
    fields = {"aligned": tensors.to_proto(aligned.half())}
    answer = await alone.PruneTokens(plus_plus(view(**fields), question=QUESTION, vision_digest=digest))
    expected = torch.nn.functional.cosine_similarity(aligned.half().float(), vector[None])
    np.testing.assert_allclose(scores_of(answer), expected.numpy(), atol=1e-5)
    assert set(indices(answer)) >= {3, 12}
    assert answer.summary.text_model == "clip"
    assert [timing.stage for timing in answer.timings] == ["text", "select"]


@pytest.mark.parametrize("question", ["", "  \n"])
async def test_an_empty_question_chooses_no_token_and_says_so(question, alone, digest):
    tokens = view(aligned=tensors.to_proto(torch.randn(16, A)))
    answer = await alone.PruneTokens(plus_plus(tokens, question=question, vision_digest=digest))
    assert by_text(answer) == []
    assert answer.summary.text_note == "no question"


async def test_a_method_that_reads_no_text_ignores_guidance(alone):
    answer = await alone.PruneTokens(request(question="x" * 100, vision_digest="another", keep_count=4))
    assert (answer.summary.text_model, answer.summary.text_note) == ("", "")


# --- bad input ------------------------------------------------------------------------------------

F16 = tensor_pb2.DATA_TYPE_F16
INVALID = (InvalidInput, "INVALID_FIELD")
MISSING = (InvalidInput, "MISSING_FIELD")
LIMIT = (InvalidInput, "LIMIT_EXCEEDED")
CASES = {
    "no views": (pb.PruneTokensRequest(), *INVALID, "views"),
    "too many views": (request(*[view(1, 1)] * 300), *INVALID, "views"),
    "no grid": (request(encoder_pb.View()), *INVALID, "views[0].grid_height"),
    "negative grid": (request(view(), view(4, -4)), *INVALID, "views[1].grid_width"),
    "huge grid": (request(view(2**17, 2**17, layers=())), *LIMIT, "views[0].grid_height"),
    "many tokens in few bytes": (
        request(*[view(2**8, 2**8, layers=())] * 5, method="NONE"),
        *LIMIT,
        "views[4].grid_height",
    ),
    "no scores": (request(view(layers=())), *MISSING, "views[0].attention"),
    "one view without scores": (request(view(), view(layers=(1,))), *MISSING, "views[1].attention"),
    "layer 0": (request(view(layers=(0, 2))), *INVALID, "views[0].attention[0].layer"),
    "a layer that did not come": (request(object_layer=1, deep_layer=9), *MISSING, "views[0].attention"),
    "deep layer 0": (request(deep_layer=0), *INVALID, "deep_layer"),
    "object layer behind the deep one": (request(object_layer=3), *INVALID, "policy.object_layer"),
    "unknown method": (
        pb.PruneTokensRequest(views=[view()], policy={"method": 99}),
        *INVALID,
        "policy.method",
    ),
    "unknown buffer": (request(buffer=50), *INVALID, "policy.buffer"),
    "0 tokens": (request(keep_count=0), *INVALID, "policy.keep_count"),
    "fewer tokens than views": (request(view(), view(), keep_count=1), *INVALID, "policy.keep_count"),
    "ratio 0": (request(keep_ratio=0), *INVALID, "policy.keep_ratio"),
    "ratio NaN": (request(keep_ratio=math.nan), *INVALID, "policy.keep_ratio"),
    "alpha 2": (request(alpha=2), *INVALID, "policy.alpha"),
    "beta below 0": (request(beta=-1), *INVALID, "policy.beta"),
    "features of another grid": (
        request(view(features=half(np.zeros((15, 2))))),
        *INVALID,
        "views[0].features.shape",
    ),
    "features of rank 1": (request(view(features=half(np.zeros(16)))), *INVALID, "views[0].features.shape"),
    "features of integers": (
        request(view(features=tensors.to_proto(torch.zeros(16, 2, dtype=torch.int32)))),
        *INVALID,
        "views[0].features.dtype",
    ),
    "features of no dtype": (
        request(view(features=tensor_pb2.Tensor(shape=[16, 2], data=bytes(64)))),
        *INVALID,
        "views[0].features.dtype",
    ),
    "short features": (
        request(view(features=tensor_pb2.Tensor(dtype=F16, shape=[16, 2], data=bytes(63)))),
        *INVALID,
        "views[0].features.data",
    ),
    "features without data": (
        request(view(features=tensor_pb2.Tensor(dtype=F16, shape=[16, 2]))),
        *INVALID,
        "views[0].features.data",
    ),
    "features that claim much": (
        request(view(features=tensor_pb2.Tensor(dtype=F16, shape=[16, 2**60], data=b"x"))),
        *INVALID,
        "views[0].features.data",
    ),
    "scores that claim a row too many": (
        request(
            encoder_pb.View(
                grid_height=4, grid_width=4, attention=[{"layer": 1, "scores": single(range(20))}]
            )
        ),
        *INVALID,
        "views[0].attention[0].scores.shape",
    ),
    "NaN scores": (
        request(
            encoder_pb.View(
                grid_height=1, grid_width=1, attention=[{"layer": 1, "scores": single([math.nan])}]
            )
        ),
        *INVALID,
        "views[0].attention[0].scores",
    ),
    "scores in half precision": (
        request(
            encoder_pb.View(grid_height=1, grid_width=1, attention=[{"layer": 1, "scores": half(np.ones(1))}])
        ),
        *INVALID,
        "views[0].attention[0].scores.dtype",
    ),
    "aligned of another grid": (
        request(view(aligned=half(np.zeros((4, 4))))),
        *INVALID,
        "views[0].aligned.shape",
    ),
    "tokens of another width outside the grid": (
        request(view(features=half(np.ones((16, 2))), prefix_features=half(np.ones((1, 3))))),
        *INVALID,
        "views[0].prefix_features.shape",
    ),
    "a region outside the grid": (
        request(view(valid=encoder_pb.ValidRegion(top=3, height=2, width=1))),
        *INVALID,
        "views[0].valid.height",
    ),
    "DivPrune without features": (request(method="DIVPRUNE"), *MISSING, "views[0].features"),
    "DivPrune over features that are not finite": (
        request(view(features=half(np.full((16, 3), math.inf))), method="DIVPRUNE"),
        *INVALID,
        "views[0].features",
    ),
    "VisionZip without scores": (
        request(view(layers=()), method="VISIONZIP"),
        *MISSING,
        "views[0].attention",
    ),
    "attention from CLS of another grid": (
        request(
            encoder_pb.View(
                grid_height=1,
                grid_width=1,
                attention=[{"layer": 1, "scores": single([1]), "cls_scores": single([1, 2])}],
            ),
            method="VISIONZIP",
        ),
        *INVALID,
        "views[0].attention[0].cls_scores.shape",
    ),
    "a similarity too few": (
        plus_plus(view(), view(), similarity=pb.SimilarityScores(views=[single(range(16))])),
        *INVALID,
        "similarity.views",
    ),
    "a similarity too short": (
        plus_plus(similarity=pb.SimilarityScores(views=[single(range(15))])),
        *INVALID,
        "similarity.views[0].shape",
    ),
    "an infinite similarity": (
        plus_plus(similarity=pb.SimilarityScores(views=[single([math.inf] * 16)])),
        *INVALID,
        "similarity.views[0]",
    ),
    "a text vector and nothing to compare": (
        plus_plus(text_vector=half(np.ones(3))),
        *MISSING,
        "views[0].features",
    ),
    "a text vector of another width": (
        plus_plus(view(features=half(np.ones((16, 2)))), text_vector=half(np.ones(3))),
        *INVALID,
        "text_vector",
    ),
    "two text vectors": (
        plus_plus(view(features=half(np.ones((16, 3)))), text_vector=half(np.ones((2, 3)))),
        *INVALID,
        "text_vector.shape",
    ),
    "a text vector of rank 3": (
        plus_plus(
            view(features=half(np.ones((16, 3)))),
            text_vector=tensor_pb2.Tensor(dtype=F16, shape=[1, 1, 3], data=bytes(6)),
        ),
        *INVALID,
        "text_vector.shape",
    ),
    "a text vector that is not finite": (
        plus_plus(view(features=half(np.ones((16, 3)))), text_vector=half(np.full(3, math.nan))),
        *INVALID,
        "text_vector",
    ),
    "features that are not finite": (
        plus_plus(view(features=half(np.full((16, 3), math.inf))), text_vector=half(np.ones(3))),
        *INVALID,
        "views[0].features",
    ),
    "a question without a digest": (
        plus_plus(question=QUESTION),
        Mismatch,
        "MODEL_MISMATCH",
        "vision_digest",
    ),
    "a question for another tower": (
        plus_plus(question=QUESTION, vision_digest="0" * 64),
        Mismatch,
        "MODEL_MISMATCH",
        "vision_digest",
    ),
    "a question that is too long": (plus_plus(question="x" * 32_769), *LIMIT, "question"),
}


@pytest.mark.parametrize("case", CASES)
async def test_bad_input_is_told_its_field_and_the_service_lives_on(case, alone):
    bad, kind, reason, field = CASES[case]
    error = await error_of(alone.PruneTokens(bad, timeout=20))
    assert (type(error), error.reason, error.field) == (kind, reason, field), error
    good = await alone.PruneTokens(request(keep_count=5), timeout=20)
    assert len(indices(good)) == 5


async def test_a_question_needs_aligned_tokens(alone, digest):
    bad = plus_plus(view(), question=QUESTION, vision_digest=digest)
    error = await error_of(alone.PruneTokens(bad))
    assert (type(error), error.reason, error.field) == (*MISSING, "views[0].aligned")
    wrong = plus_plus(view(aligned=half(np.ones((16, 5)))), question=QUESTION, vision_digest=digest)
    error = await error_of(alone.PruneTokens(wrong))
    assert (type(error), error.field) == (InvalidInput, "question")


async def test_a_view_has_no_more_layers_than_a_tower_may(alone):
    tokens = view(1, 1, layers=range(1, 258))
    error = await error_of(alone.PruneTokens(request(tokens)))
    assert (type(error), error.reason, error.field) == (*LIMIT, "views[0].attention")
    assert "257 layers, expected at most 256" in error.message
    error = await error_of(alone.PruneTokens(request(view(1, 1, layers=range(1, 257)), deep_layer=30_000)))
    assert (type(error), error.reason, error.field) == (*MISSING, "views[0].attention")


async def test_a_question_of_more_chunks_than_are_read_is_refused_before_anything_is_encoded(
    encoder, pruner, alone, digest
):
    long, longer = "red " * 16 * 75, "red " * (16 * 75 + 1)
    policy = pb.PrunePolicy(method=METHODS["HIPRUNE_PLUS_PLUS"], keep_count=20)
    ask = pb.PruneImageRequest(media=media_pb2.Media(image=b"long"), policy=policy, question=longer)
    tokens = plus_plus(view(aligned=half(np.ones((16, A)))), question=longer, vision_digest=digest)
    for refused in (pruner.PruneImage(ask), alone.PruneTokens(tokens)):
        error = await error_of(refused)
        assert (type(error), error.reason, error.field) == (*LIMIT, "question")
        assert "17 chunks of 75 tokens of text, expected at most 16" in error.message
    assert not encoder.calls
    ask.question = long
    assert (await pruner.PruneImage(ask)).media.summary.text_model
    ask.question, ask.policy.method = longer, METHODS["HIPRUNE"]  # reads no question
    assert len((await pruner.PruneImage(ask)).media.views) == 1


async def test_a_pruner_without_a_text_model_refuses_questions_and_takes_vectors(model):
    service = await started("unix:/nonexistent/encoder.sock", model, paired_model="none")
    async with Serving(service.register) as channel:
        stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
        answer = await stub.GetPruner(pb.GetPrunerRequest())
        assert (answer.text_model, answer.fingerprint.paired_digest) == ("", "")
        error = await error_of(stub.PruneTokens(plus_plus(question=QUESTION)))
        assert (type(error), error.reason, error.field) == (Mismatch, "NO_TEXT_MODEL", "policy.method")
        vector = plus_plus(view(features=half(np.ones((16, 3)))), text_vector=half(np.ones(3)))
        assert len(indices(await stub.PruneTokens(vector))) == 8
    await service.stop()


async def test_it_says_what_it_serves(alone, model):
    answer = await alone.GetPruner(pb.GetPrunerRequest())
    checkpoint = open_checkpoint(str(model))
    assert answer.fingerprint.vision_digest == checkpoint.vision_digest
    assert answer.fingerprint.paired_digest == digest_of_all(model.parent / "clip")
    assert (answer.fingerprint.family, answer.fingerprint.layers) == ("llava", FACTS.layers)
    assert (answer.deep_layer, answer.text_model, answer.cache_store) == (FACTS.deep_layer, "clip", "memory")
    policy = answer.default_policy
    assert (policy.method, policy.keep_ratio, policy.alpha, policy.object_layer) == (
        METHODS["HIPRUNE"],
        1 / 3,
        0.1,
        FACTS.object_layer,
    )
    assert (policy.beta, policy.buffer, policy.text_budget) == (
        0.1,
        pb.BUFFER_SHAPE_FLAT,
        pb.TEXT_BUDGET_INSIDE,
    )


# --- images ---------------------------------------------------------------------------------------


def ask(image: bytes = b"image", question: str = "", **policy) -> pb.PruneImageRequest:
    return pb.PruneImageRequest(
        media=media_pb2.Media(image=image), policy=pb.PrunePolicy(**policy), question=question
    )


def status(answer) -> str:
    return pb.CacheStatus.Name(answer.cache).removeprefix("CACHE_STATUS_")


@pytest.mark.parametrize("method", ["HIPRUNE", "HIPRUNE_PLUS_PLUS"])
async def test_an_encoder_that_is_away_is_unavailable_within_the_deadline(method, alone):
    begun = time.monotonic()
    error = await error_of(alone.PruneImage(ask(method=METHODS[method], question=QUESTION), timeout=10))
    assert (type(error), error.reason) == (Unavailable, "ENCODER_UNREACHABLE")
    assert time.monotonic() - begun < 8


async def test_an_image_is_encoded_once_and_found_in_either_level(pruner, encoder):
    first = await pruner.PruneImage(ask(keep_ratio=1 / 3))
    assert status(first) == "MISS"
    again = await pruner.PruneImage(ask(keep_ratio=1 / 3))
    assert status(again) == "PRUNED_HIT"
    assert again.media == first.media
    count = await pruner.PruneImage(ask(keep_count=THIRD))
    assert status(count) == "PRUNED_HIT"
    assert count.media.summary.policy.keep_count == THIRD
    assert count.media.views == first.media.views
    assert status(await pruner.PruneImage(ask(keep_count=20))) == "ENCODED_HIT"
    text = ask(method=METHODS["HIPRUNE_PLUS_PLUS"], question=QUESTION)
    assert status(await pruner.PruneImage(text)) == "ENCODED_HIT"
    assert len(encoder.calls) == 1
    assert status(await pruner.PruneImage(ask(b"another"))) == "MISS"


async def test_concurrent_identical_requests_encode_once(pruner, encoder):
    encoder.go_on.clear()
    asked = [asyncio.create_task(wait_for(pruner.PruneImage(ask(b"same"), timeout=20))) for _ in range(8)]
    await asyncio.wait_for(encoder.called.wait(), 10)
    await asyncio.sleep(0.1)
    asked[0].cancel()  # the one that leads
    await asyncio.sleep(0.05)
    encoder.go_on.set()
    answers = await asyncio.gather(*asked[1:])
    assert len(encoder.calls) == 1
    assert all(answer.media == answers[0].media for answer in answers)


async def test_nobody_waits_behind_a_flood_of_divprune_and_who_leaves_it_frees_its_thread(
    pruner, encoder, monkeypatch
):
    begun, ended, go_on = threading.Event(), threading.Event(), threading.Event()
    check = divprune._check_wanted

    def held(is_wanted) -> None:
        begun.set()
        while is_wanted() and not go_on.wait(0.01):
            pass
        if not is_wanted():
            ended.set()
        check(is_wanted)

    assert status(await pruner.PruneImage(ask(keep_count=20))) == "MISS"
    monkeypatch.setattr(divprune, "_check_wanted", held)
    compared = {"method": METHODS["DIVPRUNE"], "keep_count": 5}
    images = [asyncio.ensure_future(wait_for(pruner.PruneImage(ask(**compared)))) for _ in range(3)]
    tokens = request(view(features=half(np.eye(16))), **{**compared, "method": "DIVPRUNE"})
    flood = [*images, *(asyncio.ensure_future(wait_for(pruner.PruneTokens(tokens))) for _ in range(3))]
    try:
        assert await asyncio.to_thread(begun.wait, 10)
        async with asyncio.timeout(10):
            assert status(await pruner.PruneImage(ask(keep_count=20))) == "PRUNED_HIT"
            assert status(await pruner.PruneImage(ask(keep_count=21))) == "ENCODED_HIT"
            await pruner.PruneTokens(request(view(), keep_count=3))
        assert not any(task.done() for task in flood)
        for task in flood:
            task.cancel()
        assert await asyncio.to_thread(ended.wait, 10)
    finally:
        go_on.set()
    assert len((await pruner.PruneTokens(tokens, timeout=10)).views[0].selection.kept_indices) == 5
    assert len(encoder.calls) == 1


async def wait_for(answer):
    return await answer


async def test_scores_of_another_layer_are_not_served_from_the_cache(pruner):
    def scored(layer: int) -> pb.PruneImageRequest:
        return ask(method=METHODS["HIPRUNE"], object_layer=layer, include_scores=True)

    one = (await pruner.PruneImage(scored(3))).media.views[0].selection
    other = (await pruner.PruneImage(scored(5))).media.views[0].selection
    assert one.scores.object.data != other.scores.object.data


async def test_an_encoded_image_without_attention_from_cls_is_encoded_anew_and_replaced(pruner, encoder):
    encoder.bend = without_cls
    assert status(await pruner.PruneImage(ask(b"old"))) == "MISS"
    encoder.bend = lambda response: None
    zipped = ask(b"old", method=METHODS["VISIONZIP"], keep_count=20, include_scores=True)
    answer = await pruner.PruneImage(zipped)
    assert (status(answer), len(encoder.calls)) == ("MISS", 2)
    assert answer.media.views[0].selection.scores.HasField("cls")
    again = ask(b"old", method=METHODS["VISIONZIP"], keep_count=30)
    assert status(await pruner.PruneImage(again)) == "ENCODED_HIT"


def without_cls(response) -> None:
    """As an encoder answers that does not record attention from CLS yet."""
    for entry in response.views[0].attention:
        entry.ClearField("cls_scores")


async def test_an_encoder_from_before_has_its_images_found_and_visionzip_refused(pruner, encoder):
    assert status(await pruner.PruneImage(ask(b"new"))) == "MISS"
    encoder.bend = without_cls
    assert status(await pruner.PruneImage(ask(b"old", keep_count=20))) == "MISS"
    assert status(await pruner.PruneImage(ask(b"old", keep_count=21))) == "ENCODED_HIT"
    random = ask(b"old", method=METHODS["RANDOM"])
    assert status(await pruner.PruneImage(random)) == "ENCODED_HIT"
    assert len(encoder.calls) == 2
    error = await error_of(pruner.PruneImage(ask(b"old", method=METHODS["VISIONZIP"])))
    assert (type(error), error.field) == (Mismatch, "policy.method")
    assert "does not record attention from CLS: upgrade it" in str(error)
    encoder.bend = lambda response: None
    assert status(await pruner.PruneImage(ask(b"newer"))) == "MISS"
    assert (
        status(await pruner.PruneImage(ask(b"old", keep_count=22))) == "MISS"
    )  # and replaced, whatever asks
    assert status(await pruner.PruneImage(ask(b"old", method=METHODS["VISIONZIP"]))) == "ENCODED_HIT"


async def test_a_control_reports_no_score_that_it_did_not_read(pruner):
    request = ask(method=METHODS["RANDOM"], include_scores=True)
    scores = (await pruner.PruneImage(request)).media.views[0].selection.scores
    assert not scores.ListFields()


def nan_scores(response):
    response.views[0].attention[0].scores.CopyFrom(single(np.full(N, math.nan)))


def lose_layers(response):
    del response.views[0].attention[:]


BENT = {
    "no views": lambda response: response.ClearField("views"),
    "no grid": lambda response: response.views[0].ClearField("grid_height"),
    "short features": lambda response: response.views[0].features.ClearField("data"),
    "NaN scores": nan_scores,
    "no scores": lose_layers,
    "no aligned tokens": lambda response: response.views[0].ClearField("aligned"),
}


@pytest.mark.parametrize("bent", BENT)
async def test_an_encoder_that_answers_nonsense_is_not_the_callers_fault(bent, pruner, encoder, caplog):
    encoder.bend = BENT[bent]
    question = ask(method=METHODS["HIPRUNE_PLUS_PLUS"], question=QUESTION)
    error = await error_of(pruner.PruneImage(question))
    assert (type(error), error.reason, error.field) == (Internal, "INTERNAL", "")
    assert "views" in caplog.text  # the log has the cause
    encoder.bend = lambda response: None
    assert status(await pruner.PruneImage(ask(b"good"))) == "MISS"


@pytest.mark.parametrize("field", ["vision_digest", "preprocessing_digest", "paired_digest"])
async def test_an_encoder_of_another_model_is_refused(field, pruner, encoder):
    setattr(encoder.fingerprint, field, "0" * 64)
    question = ask(method=METHODS["HIPRUNE_PLUS_PLUS"], question=QUESTION)
    error = await error_of(pruner.PruneImage(question))
    assert (type(error), error.reason) == (Mismatch, "MODEL_MISMATCH")
    assert "start both on the same model" in str(error)


def of_video(*frames: bytes, **rate: float) -> pb.PruneImageRequest:
    return pb.PruneImageRequest(media=media_pb2.Media(video=media_pb2.Video(frames=frames, **rate)))


@pytest.mark.parametrize(
    ("bad", "kind", "reason", "field"),
    [
        (pb.PruneImageRequest(), *MISSING, "media"),
        (ask(b""), *MISSING, "media.image"),
        (ask(bytes(1001)), *LIMIT, "media.image"),
        (of_video(), *INVALID, "media.video.frames"),
        (of_video(*[b"x"] * 4), *INVALID, "media.video.frames"),
        (of_video(b"x", b""), *MISSING, "media.video.frames[1]"),
        (of_video(b"x", bytes(1001)), *LIMIT, "media.video.frames[1]"),
        (of_video(*[bytes(667)] * 3), *LIMIT, "media.video.frames"),
        (of_video(b"x", frames_per_second=0), *INVALID, "media.video.frames_per_second"),
        (of_video(b"x", frames_per_second=-1), *INVALID, "media.video.frames_per_second"),
        (of_video(b"x", frames_per_second=math.nan), *INVALID, "media.video.frames_per_second"),
        (of_video(b"x", frames_per_second=math.inf), *INVALID, "media.video.frames_per_second"),
        (ask(question="x" * 32_769), *LIMIT, "question"),
        (ask(object_layer=FACTS.deep_layer + 1), *INVALID, "policy.object_layer"),
        (ask(keep_ratio=2), *INVALID, "policy.keep_ratio"),
    ],
)
async def test_bad_images_are_refused_before_the_encoder_is_asked(bad, kind, reason, field, pruner, encoder):
    error = await error_of(pruner.PruneImage(bad))
    assert (type(error), error.reason, error.field) == (kind, reason, field)
    assert encoder.calls == []
