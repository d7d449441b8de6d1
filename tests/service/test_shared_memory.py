"""The hop from encoder to pruner through shared memory: the same answers, nothing left, no call failed."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import torch

from hiprune import shared_memory, tensors
from hiprune.checkpoints import open_checkpoint
from hiprune.errors import Internal, InvalidInput, from_rpc
from hiprune.server import RequestGate
from hiprune.shared_memory import Borrower, Loan
from hiprune.stack import Stack
from hiprune.v1 import encoder_service_pb2 as encoder_pb
from hiprune.v1 import encoder_service_pb2_grpc, media_pb2, pruner_service_pb2_grpc, tensor_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from hiprune.workers import Workers
from services.encoder.process import EncoderService
from services.encoder.service import EncoderServicer
from services.encoder.settings import Settings as EncoderSettings
from services.pruner.process import PrunerService
from services.pruner.settings import Settings as PrunerSettings
from tests.stacks import picture

LAYERS = [1]
USED = "rows came through shared memory"
"""What the pruner's log says at level debug."""
POLICIES = {
    "third": pb.PrunePolicy(method=pb.METHOD_HIPRUNE, keep_ratio=1 / 3),
    "all": pb.PrunePolicy(method=pb.METHOD_NONE),
    "guided": pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.2, include_scores=True),
}


def left_in(directory: Path) -> set[str]:
    """Segments that lie in the directory."""
    return {path.name for path in directory.iterdir() if not path.name.endswith("-probe")}


async def gone(directory: Path, within_s: float = 20) -> None:
    """Returns when no segment is left."""
    deadline = time.monotonic() + within_s
    while left_in(directory):
        assert time.monotonic() < deadline, left_in(directory)
        await asyncio.sleep(0.02)


def is_shared(response: encoder_pb.EncodeImageResponse) -> bool:
    kinds = {view.features.WhichOneof("payload") for view in response.views}
    assert len(kinds) == 1
    return kinds == {"shared_memory"}


def encode_request(name: str = "scene00.png", **fields) -> encoder_pb.EncodeImageRequest:
    return encoder_pb.EncodeImageRequest(media=media_pb2.Media(image=picture(name)), layers=LAYERS, **fields)


def prune_request(policy: str = "third", name: str = "scene00.png") -> pb.PruneImageRequest:
    return pb.PruneImageRequest(
        media=media_pb2.Media(image=picture(name)),
        policy=POLICIES[policy],
        question="which shape is blue ?" if policy == "guided" else "",
    )


# --- real processes --------------------------------------------------------------------------------------


class Pair:
    """A real encoder and a real pruner without a cache; every answer is large enough."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stack = Stack(
            redis=False,
            environ={
                "HIPRUNE_ENCODER_SHARED_MEMORY_DIR": str(directory),
                "HIPRUNE_ENCODER_SHARED_MEMORY_MIN_BYTES": "1",
                "HIPRUNE_ENCODER_LOG_LEVEL": "debug",
                "HIPRUNE_PRUNER_SHARED_MEMORY_DIR": str(directory),
                "HIPRUNE_PRUNER_CACHE": "off",
                "HIPRUNE_PRUNER_LOG_LEVEL": "debug",
            },
        )

    def start(self, *services: str) -> None:
        for service in services:
            self.stack.start_service(service)
        for service in services:
            self.stack.wait_ready(service)

    def uses(self) -> int:
        """How many answers the pruner has taken from shared memory."""
        return self.stack.log_of("pruner").count(USED)

    async def prune(self, request: pb.PruneImageRequest) -> pb.PrunedMedia:
        async with grpc.aio.insecure_channel(self.stack.pruner_address) as channel:
            stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
            return (await stub.PruneImage(request, timeout=60)).media

    async def encode(
        self, request: encoder_pb.EncodeImageRequest, timeout_s: float = 60
    ) -> encoder_pb.EncodeImageResponse:
        async with grpc.aio.insecure_channel(self.stack.encoder_address) as channel:
            stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
            return await stub.EncodeImage(request, timeout=timeout_s)

    async def token(self) -> str:
        """What a client must send."""
        borrower = Borrower(str(self.directory))
        borrower.learn((await self.encode(encode_request())).shared_memory_probe)
        assert borrower.token
        return borrower.token


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    made = Pair(tmp_path_factory.mktemp("memory"))
    try:
        made.start("encoder", "pruner")
        yield made
    finally:
        made.stack.stop()
    assert list(made.directory.iterdir()) == []  # the probe too


@pytest.mark.extra
async def test_answers_through_shared_memory_are_the_inline_ones_bit_for_bit(pair):
    inline = {policy: await pair.prune(prune_request(policy, "scene01.png")) for policy in ["third"]}
    assert pair.uses() == 0  # the first answer brought the probe
    for policy in POLICIES:
        before = pair.uses()
        shared = await pair.prune(prune_request(policy))
        assert pair.uses() == before + 1
        response = await pair.encode(encode_request(aligned=True))
        assert not is_shared(response)
        rows = tensors.from_proto(response.views[0].features, field="x", shape=(None, None))
        (view,) = shared.views
        kept = tensors.from_proto(view.features, field="x", shape=(None, None))
        assert torch.equal(kept, rows[torch.tensor(view.selection.kept_indices)])
    assert await pair.prune(prune_request("third", "scene01.png")) == inline["third"]
    await gone(pair.directory, 0)


@pytest.mark.extra
async def test_what_a_client_dies_with_goes_at_its_deadline(pair):
    program = (
        "import os, sys, grpc\n"
        "from hiprune.v1 import encoder_service_pb2 as pb, encoder_service_pb2_grpc, media_pb2\n"
        "address, token, path = sys.argv[1:]\n"
        "stub = encoder_service_pb2_grpc.EncoderServiceStub(grpc.insecure_channel(address))\n"
        "media = media_pb2.Media(image=open(path, 'rb').read())\n"
        "request = pb.EncodeImageRequest(media=media, shared_memory_token=token)\n"
        "response = stub.EncodeImage(request, timeout=4)\n"
        "print(response.views[0].features.shared_memory.segment, flush=True)\n"
        "os._exit(9)\n"
    )
    path = pair.directory.parent / "scene.png"
    path.write_bytes(picture("scene00.png"))
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, pair.stack.encoder_address, await pair.token(), path),
        stdout=subprocess.PIPE,
    )
    name = (await client.communicate())[0].decode().strip()
    assert name.startswith("hiprune-")
    await gone(pair.directory)


@pytest.mark.extra
async def test_a_directory_that_is_full_costs_no_answer(pair):
    await pair.prune(prune_request())
    token = await pair.token()
    process = pair.stack.processes["encoder"].pid
    before, uses = resource.prlimit(process, resource.RLIMIT_FSIZE), pair.uses()
    expected = await pair.prune(prune_request())
    assert pair.uses() == uses + 1
    # as on a full one, the kernel writes a part and then refuses
    resource.prlimit(process, resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert not is_shared(await pair.encode(encode_request(shared_memory_token=token)))
        assert await pair.prune(prune_request()) == expected
        assert pair.uses() == uses + 1
        await gone(pair.directory, 0)
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)
    assert await pair.prune(prune_request()) == expected
    assert pair.uses() == uses + 2


@pytest.mark.extra
async def test_an_encoder_that_restarts_is_recognised_by_the_next_answer(pair):
    expected = await pair.prune(prune_request())
    await pair.prune(prune_request())
    uses = pair.uses()
    assert uses > 0
    # told to stop with an answer that nobody takes: its segment goes with it
    await pair.encode(encode_request(shared_memory_token=await pair.token()))
    assert left_in(pair.directory)
    pair.stack.end("encoder")
    assert list(pair.directory.iterdir()) == []
    pair.start("encoder")
    assert await pair.prune(prune_request()) == expected
    assert pair.uses() == uses  # inline, for its token was the old one's
    assert await pair.prune(prune_request()) == expected
    assert pair.uses() == uses + 1
    # killed, and what it leaves is its successor's to remove
    await pair.encode(encode_request(shared_memory_token=await pair.token()))
    pair.stack.end("encoder", signal.SIGKILL)
    assert len(list(pair.directory.iterdir())) == 2
    pair.start("encoder")
    assert left_in(pair.directory) == set()
    assert await pair.prune(prune_request()) == expected
    assert await pair.prune(prune_request()) == expected
    assert pair.uses() == uses + 2


# --- one process, to look inside -------------------------------------------------------------------------


class Serving:
    """A server of this process on an address, and a channel to it."""

    def __init__(self, address: str, register: Callable[[grpc.aio.Server], object]) -> None:
        gate = RequestGate(60)
        gate.open()
        self.server = grpc.aio.server(interceptors=[gate])
        register(self.server)
        port = self.server.add_insecure_port(address)
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"

    async def __aenter__(self) -> grpc.aio.Channel:
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        return self.channel

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.stop(None)


@pytest.fixture
async def inside(tmp_path, model, monkeypatch):
    """An encoder and a pruner with a cache; and the encoder's other door, a TCP port."""
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.1)
    directory = tmp_path / "memory"
    directory.mkdir()
    settings = EncoderSettings(
        model=str(model), shared_memory_dir=str(directory), shared_memory_min_bytes=10_000, threads=1
    )
    encoder = EncoderService(settings)
    await encoder.start()
    async with (
        Serving(f"unix:{tmp_path}/encoder.sock", encoder.register) as channel,
        Serving("127.0.0.1:0", encoder.register) as port,
    ):
        pruner = PrunerService(
            PrunerSettings(
                model=str(model), encoder=f"unix:{tmp_path}/encoder.sock", shared_memory_dir=str(directory)
            )
        )
        await pruner.start()
        async with Serving(f"unix:{tmp_path}/pruner.sock", pruner.register) as pruning:
            yield SimpleNamespace(
                directory=directory,
                encoder=encoder_service_pb2_grpc.EncoderServiceStub(channel),
                over_tcp=encoder_service_pb2_grpc.EncoderServiceStub(port),
                pruner=pruner_service_pb2_grpc.PrunerServiceStub(pruning),
                store=pruner._servicer._cache.store,
            )
        await pruner.stop()
    await encoder.stop()
    assert list(directory.iterdir()) == []


async def token_of(inside: SimpleNamespace) -> str:
    """What a client must send."""
    borrower = Borrower(str(inside.directory))
    borrower.learn((await inside.encoder.EncodeImage(encode_request())).shared_memory_probe)
    assert borrower.token
    return borrower.token


async def test_rows_and_aligned_lie_in_one_segment_of_the_servers_and_scores_do_not(inside):
    plain = await inside.encoder.EncodeImage(encode_request(aligned=True))
    response = await inside.encoder.EncodeImage(
        encode_request(aligned=True, shared_memory_token=await token_of(inside))
    )
    assert response.shared_memory_probe == ""
    (name,) = left_in(inside.directory)
    memory = Borrower(str(inside.directory)).take(response)
    for view, expected in zip(response.views, plain.views, strict=True):
        assert {view.features.shared_memory.segment, view.aligned.shared_memory.segment} == {name}
        assert view.attention == expected.attention
    response.ClearField("timings")
    plain.ClearField("timings")
    plain.ClearField("shared_memory_probe")
    assert tensors.inlined(response, memory) == plain


@pytest.mark.parametrize("token", ["", "0" * 32, "é", "x" * 10_000], ids=len)
async def test_a_wrong_token_is_answered_inline_and_told_the_probe(token, inside):
    response = await inside.encoder.EncodeImage(encode_request(shared_memory_token=token))
    assert not is_shared(response)
    assert (inside.directory / response.shared_memory_probe).is_file()
    await gone(inside.directory, 0)


async def test_a_caller_over_tcp_is_answered_inline_whatever_it_sends(inside):
    token = await token_of(inside)
    assert is_shared(await inside.encoder.EncodeImage(encode_request(shared_memory_token=token), timeout=1))
    for given in (token, ""):
        response = await inside.over_tcp.EncodeImage(encode_request(shared_memory_token=given))
        assert not is_shared(response)
        assert response.shared_memory_probe == ""
    await gone(inside.directory)


async def test_a_call_that_is_cancelled_leaves_no_segment(inside, monkeypatch):
    token = await token_of(inside)
    begun, go_on = threading.Event(), threading.Event()
    write = Loan.write

    def slow(loan, parts):
        write(loan, parts)
        begun.set()
        assert go_on.wait(20)

    monkeypatch.setattr(Loan, "write", slow)
    call = inside.encoder.EncodeImage(encode_request(shared_memory_token=token))
    assert await asyncio.to_thread(begun.wait, 20)
    assert left_in(inside.directory)
    call.cancel()
    await gone(inside.directory)
    go_on.set()


async def test_an_answer_that_nobody_waits_for_any_more_leaves_no_segment(inside, monkeypatch):
    await inside.pruner.PruneImage(prune_request())  # which learns the probe
    arrived, run = asyncio.Event(), Workers.run

    async def busy(workers, work, cost=1, **rest):
        if "_ask" not in getattr(work, "__qualname__", ""):
            return await run(workers, work, cost, **rest)
        arrived.set()  # with a segment, and all threads have other work
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(Workers, "run", busy)
    call = inside.pruner.PruneImage(prune_request(name="scene01.png"), timeout=60)
    try:
        await asyncio.wait_for(arrived.wait(), 20)
        await gone(inside.directory)
    finally:
        call.cancel()


async def test_a_call_that_is_cancelled_before_its_answer_has_gone_leaves_no_segment(inside, monkeypatch):
    token = await token_of(inside)
    lent, add_views = asyncio.Event(), EncoderServicer._add_views

    async def slow(*args):
        await add_views(*args)
        lent.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(EncoderServicer, "_add_views", slow)
    call = inside.encoder.EncodeImage(encode_request(shared_memory_token=token))
    await asyncio.wait_for(lent.wait(), 20)
    assert left_in(inside.directory)
    call.cancel()
    await gone(inside.directory)


async def test_a_call_that_fails_late_leaves_no_segment(inside, monkeypatch):
    token = await token_of(inside)
    write = Loan.write

    def broken(loan, parts):
        write(loan, parts)
        raise RuntimeError("and then this")

    monkeypatch.setattr(Loan, "write", broken)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inside.encoder.EncodeImage(encode_request(shared_memory_token=token))
    assert isinstance(from_rpc(caught.value, peer="encoder"), Internal)
    assert left_in(inside.directory) == set()


async def test_every_row_reaches_the_cache_and_no_name_of_a_segment(inside, monkeypatch):
    values = []
    put = inside.store.put

    async def noted(key, value, **owner):
        values.append(value)
        return await put(key, value, **owner)

    monkeypatch.setattr(inside.store, "put", noted)
    await inside.pruner.PruneImage(prune_request(name="scene01.png"))
    taken = []
    segment = shared_memory.Segment
    monkeypatch.setattr(shared_memory, "Segment", lambda *name: taken.append(name) or segment(*name))
    first = await inside.pruner.PruneImage(prune_request("third"))
    assert first.cache == pb.CACHE_STATUS_MISS
    assert len(taken) == 1
    whole = await inside.pruner.PruneImage(prune_request("all"))
    assert whole.cache == pb.CACHE_STATUS_ENCODED_HIT
    guided = await inside.pruner.PruneImage(prune_request("guided"))
    assert guided.cache == pb.CACHE_STATUS_ENCODED_HIT
    expected = (await inside.encoder.EncodeImage(encode_request())).views[0].features
    assert whole.media.views[0].features == expected
    (view,) = first.media.views
    assert view.features == tensors.take_rows(expected, np.array(view.selection.kept_indices))
    await inside.pruner.PruneImage(prune_request("third"))
    assert max(map(len, values)) > len(expected.data)
    assert not [value for value in values if b"hiprune-" in value or b"probe" in value]
    assert len(taken) == 1


async def test_small_answers_come_inline(inside, monkeypatch):
    token = await token_of(inside)
    monkeypatch.setattr(Loan, "size_of", lambda parts: 9_999)
    assert not is_shared(await inside.encoder.EncodeImage(encode_request(shared_memory_token=token)))


async def test_a_strangers_tokens_in_shared_memory_are_refused(inside):
    place = tensor_pb2.SharedMemory(segment=f"hiprune-{'0' * 16}-{'a' * 32}")
    (inside.directory / place.segment).write_bytes(bytes(64))
    rows = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[4, 4], shared_memory=place)
    scores = tensors.to_proto(torch.rand(4))
    for name in ("features", "aligned", "prefix_features"):
        view = encoder_pb.View(grid_height=2, grid_width=2, **{name: rows})
        view.attention.add(layer=1, scores=scores)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inside.pruner.PruneTokens(pb.PruneTokensRequest(views=[view]))
        error = from_rpc(caught.value, peer="pruner")
        assert isinstance(error, InvalidInput)
        assert error.field == f"views[0].{name}.shared_memory"
    assert (inside.directory / place.segment).exists()
    (inside.directory / place.segment).unlink()


# --- an encoder that is not to be trusted ----------------------------------------------------------------


class Liar(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Answers inline as it should, and to a token with a segment as a test has bent it."""

    def __init__(self, model: Path, directory: Path) -> None:
        checkpoint = open_checkpoint(str(model))
        self.fingerprint = encoder_pb.ModelFingerprint(
            vision_digest=checkpoint.vision_digest, preprocessing_digest=checkpoint.preprocessing_digest
        )
        self.directory = directory
        self.probe = f"hiprune-{'1' * 16}-probe"
        (directory / self.probe).write_text("a" * 32)
        self.segment = f"hiprune-{'1' * 16}-{'b' * 32}"
        self.rows = torch.arange(16 * 4, dtype=torch.float32).reshape(16, 4)
        self.bend: Callable[[encoder_pb.View], object] = lambda view: None
        self.tokens: list[str] = []
        self.stubborn = False

    async def EncodeImage(self, request, context):
        self.tokens.append(request.shared_memory_token)
        view = encoder_pb.View(features=tensors.to_proto(self.rows), grid_height=4, grid_width=4)
        for layer in request.layers:
            view.attention.add(layer=layer, scores=tensors.to_proto(torch.rand(16)))
        response = encoder_pb.EncodeImageResponse(fingerprint=self.fingerprint)
        if request.shared_memory_token or self.stubborn:
            (self.directory / self.segment).write_bytes(tensors.elements(self.rows).tobytes())
            view.features.shared_memory.segment = self.segment
            self.bend(view)
        else:
            response.shared_memory_probe = self.probe
        response.views.append(view)
        return response

    def register(self, server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)


@pytest.fixture
async def lied_to(tmp_path, model):
    """A pruner that has read the probe of a liar."""
    directory = tmp_path / "memory"
    directory.mkdir()
    liar = Liar(model, directory)
    address = f"unix:{tmp_path}/encoder.sock"
    async with Serving(address, liar.register):
        pruner = PrunerService(
            PrunerSettings(
                model=str(model),
                encoder=address,
                shared_memory_dir=str(directory),
                cache="off",
                paired_model="none",
            )
        )
        await pruner.start()
        async with Serving(f"unix:{tmp_path}/pruner.sock", pruner.register) as channel:
            stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
            await stub.PruneImage(prune_request("all"))
            assert liar.tokens == [""]
            yield liar, stub
        await pruner.stop()


def places(**fields) -> Callable[[encoder_pb.View], object]:
    def bend(view: encoder_pb.View) -> None:
        for name, value in fields.items():
            setattr(view.features.shared_memory, name, value)

    return bend


LIES: dict[str, Callable[[encoder_pb.View], object]] = {
    "a path": places(segment="../victim"),
    "no name": places(segment=""),
    "the probe": places(segment=f"hiprune-{'1' * 16}-probe"),
    "a missing one": places(segment=f"hiprune-{'1' * 16}-{'c' * 32}"),
    "an end beyond": places(offset=64),
    "a negative offset": places(offset=-64),
    "misaligned": places(offset=1),
    "more rows than bytes": lambda view: view.features.shape.__setitem__(1, 5),
    "two segments": lambda view: view.aligned.CopyFrom(
        tensor_pb2.Tensor(
            dtype=tensor_pb2.DATA_TYPE_F16,
            shape=[16, 1],
            shared_memory=tensor_pb2.SharedMemory(segment=f"hiprune-{'1' * 16}-{'c' * 32}"),
        )
    ),
}


async def test_a_segment_as_it_should_be_is_taken(lied_to):
    liar, pruner = lied_to
    answer = await pruner.PruneImage(prune_request("all"))
    assert answer.media.views[0].features == tensors.to_proto(liar.rows)
    assert liar.tokens == ["", "a" * 32]
    assert left_in(liar.directory) == set()


@pytest.mark.parametrize("lie", LIES)
async def test_a_segment_that_is_not_what_it_should_be_is_asked_for_once_more_inline(lie, lied_to):
    liar, pruner = lied_to
    victim = liar.directory.parent / "victim"
    victim.write_bytes(bytes(1000))
    liar.bend = LIES[lie]
    answer = await pruner.PruneImage(prune_request("all"))
    assert answer.media.views[0].features == tensors.to_proto(liar.rows)
    assert liar.tokens == ["", "a" * 32, ""]
    await pruner.PruneImage(prune_request("all"))
    assert liar.tokens[3:] == [""]  # and no more for a while
    assert victim.exists()
    assert (liar.directory / liar.probe).exists()


async def test_an_encoder_that_insists_on_a_bad_segment_is_at_fault(lied_to):
    liar, pruner = lied_to
    liar.stubborn = True
    for bend in (places(offset=-1), lambda view: None):  # the second is a good one that nobody asked for
        liar.bend = bend
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pruner.PruneImage(prune_request("all"))
        assert isinstance(from_rpc(caught.value, peer="pruner"), Internal)
    assert liar.tokens == ["", "a" * 32, "", ""]
