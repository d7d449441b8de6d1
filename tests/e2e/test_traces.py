"""Claim: one request is one trace across the processes, with exactly the spans and edges that are declared.

Real processes and a real Redis; the collector is in this process. What a scenario is expected to give is
written out here, and together the scenarios give every edge of `names.EDGES` and no other.
"""

from __future__ import annotations

import asyncio
import io
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from PIL import Image

from hiprune import telemetry
from hiprune.calls import call, connect
from hiprune.client import Client
from hiprune.errors import InvalidInput
from hiprune.telemetry import names
from hiprune.v1 import (
    encoder_service_pb2,
    encoder_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    media_pb2,
    pruner_service_pb2,
    pruner_service_pb2_grpc,
)
from tests.otlp import Seen, edges, node
from tests.stacks import picture

pytestmark = pytest.mark.extra

HIPRUNE = pruner_service_pb2.METHOD_HIPRUNE
PLUS_PLUS = pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS
QUESTION = "which colour is the circle ?"
Edges = set[tuple[str, str]]

FRONT: Edges = {
    ("", "AskImage (call)"),
    ("AskImage (call)", "AskImage"),
    ("AskImage", "queue"),
    ("AskImage", "prune"),
    ("prune", "PruneImage (call)"),
    ("PruneImage (call)", "PruneImage"),
    ("PruneImage", "cache_get"),
}
ANSWERED: Edges = FRONT | {("AskImage", "project"), ("AskImage", "prefill"), ("AskImage", "decode")}
SELECTED: Edges = {("PruneImage", "select"), ("PruneImage", "cache_put")}
READ: Edges = {("PruneImage", "text")}
JOINED: Edges = {("PruneImage", "encode")}
# with a Redis that other pruners may share, a claim is followed by one more look
ASKED: Edges = {
    ("PruneImage", "encode"),
    ("encode", "cache_get"),
    ("encode", "EncodeImage (call)"),
    ("EncodeImage (call)", "EncodeImage"),
    ("EncodeImage", "preprocess"),
}
SEEN: Edges = ASKED | {
    ("EncodeImage", "queue"),
    ("EncodeImage", "vision"),
    ("vision", "capture"),
    ("encode", "cache_put"),
}
MISS, ENCODED_HIT, PRUNED_HIT = ANSWERED | SELECTED | SEEN, ANSWERED | SELECTED, ANSWERED
FAILED = FRONT | ASKED
FOLLOWER = ANSWERED | SELECTED | JOINED
GENERATED: Edges = {("GenerateText", stage) for stage in ("queue", "project", "prefill", "decode")}
TOKENS: Edges = {("PruneTokens", "text"), ("PruneTokens", "select")}


def test_the_scenarios_together_are_all_that_is_declared():
    seen = set().union(MISS, READ, ENCODED_HIT, PRUNED_HIT, FAILED, FOLLOWER, GENERATED, TOKENS)
    assert {edge for edge in seen if edge[0]} == set(names.EDGES)


@pytest.fixture(autouse=True)
def ours(monkeypatch) -> Iterator[InMemorySpanExporter]:
    """The client's own spans: this process traces too, for one test."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with monkeypatch.context() as patch:
        patch.setattr(trace, "get_tracer", provider.get_tracer)
        telemetry._tracer.cache_clear()
        yield exporter
    telemetry._tracer.cache_clear()


def turned(name: str, degrees: int) -> bytes:
    """A picture that nobody has asked about."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(picture(name))) as image:
        image.rotate(degrees).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def ask(observed, ours):
    """Asks, waits for the trace to be whole, and gives its spans by name and its edges."""

    async def begin(image: bytes, method=HIPRUNE, ratio=1 / 3, **options):
        policy = pruner_service_pb2.PrunePolicy(method=method, keep_ratio=ratio)
        async with Client(observed.stack.address) as client:
            return await client.ask(QUESTION, image, policy=policy, **options)

    async def run(image: bytes, expected: Edges, **options) -> dict[str, list[Seen]]:
        ours.clear()
        await begin(image, **options)
        return await whole(observed, ours.get_finished_spans(), expected)

    run.begin = begin
    return run


def seen(span: ReadableSpan) -> Seen:
    """A span of this process as the collector would have seen it."""
    parent = f"{span.parent.span_id:016x}" if span.parent else ""
    own = span.get_span_context()
    return Seen(
        node(span.name, calls=span.kind is trace.SpanKind.CLIENT),
        "client",
        f"{own.trace_id:032x}",
        f"{own.span_id:016x}",
        parent,
        span.status.status_code.value,
        span.status.description or "",
        dict(span.attributes),
        (),
        span.start_time,
        span.end_time,
    )


async def whole(observed, mine, expected: Edges) -> dict[str, list[Seen]]:
    """A trace's spans by name once it has the edges that are expected, which it must, and no others."""
    own = [seen(span) for span in mine]
    (trace_id,) = {span.trace for span in own}

    def found() -> Edges:
        return edges([*own, *observed.collector.of_trace(trace_id)])

    await asyncio.to_thread(observed.collector.wait, lambda: found() >= expected)
    await asyncio.sleep(0.3)  # what else there is has come by now
    assert found() == expected
    spans: dict[str, list[Seen]] = {}
    for span in (*own, *observed.collector.of_trace(trace_id)):
        spans.setdefault(span.name, []).append(span)
    return spans


async def test_a_miss_is_one_trace_through_the_three_services(ask):
    spans = await ask(turned("scene00.png", 90), MISS)
    counted = Counter({name: len(found) for name, found in spans.items()})
    # two levels and, behind the claim, one again; an entry for each level; the object and the deep layer
    assert counted - Counter(spans.keys()) == Counter(cache_get=2, cache_put=1, capture=1, queue=1)
    services = {span.service for found in spans.values() for span in found}
    assert services == {"client", "hiprune-llm", "hiprune-pruner", "hiprune-encoder"}
    assert [span.attributes["hiprune.layer"] for span in spans["capture"]] == sorted(
        {span.attributes["hiprune.layer"] for span in spans["capture"]}
    )
    for name in ("AskImage", "PruneImage", "EncodeImage"):
        (server,), (caller,) = spans[name], spans[f"{name} (call)"]
        for span in (server, caller):
            assert span.attributes["rpc.system"] == "grpc"
            assert span.attributes["rpc.service"] == names.RPCS[name]
            assert span.attributes["rpc.method"] == name
            assert span.attributes["rpc.grpc.status_code"] == 0
        assert server.attributes["hiprune.tenant"] == "anonymous"
    assert not [span for found in spans.values() for span in found if span.status == 2]


async def test_a_span_lies_within_its_parent_or_behind_the_answer(ask):
    spans = await ask(turned("scene02.png", 90), MISS)
    by_id = {span.id: span for found in spans.values() for span in found}
    slack_ns = 2_000_000  # of clocks that are read one after the other
    for span in by_id.values():
        parent = by_id.get(span.parent)
        if parent is None:
            continue
        assert span.start_ns >= parent.start_ns - slack_ns, (parent.name, span.name)
        if span.name != "cache_put":
            assert span.end_ns <= parent.end_ns + slack_ns, (parent.name, span.name)


async def test_the_question_is_read_in_the_trace_of_a_hiprune_plus_plus_request(ask):
    await ask(turned("scene00.png", 180), MISS | READ, method=PLUS_PLUS)


async def test_an_encoded_hit_needs_no_encoder(ask):
    image = turned("scene01.png", 90)
    await ask(image, MISS)
    spans = await ask(image, ENCODED_HIT, ratio=0.5)
    outcomes = [
        (span.attributes["hiprune.cache.level"], span.attributes["hiprune.cache.outcome"])
        for span in spans["cache_get"]
    ]
    assert outcomes == [("pruned", "miss"), ("encoded", "hit")]
    await ask(image, ENCODED_HIT | READ, method=PLUS_PLUS)


async def test_a_pruned_hit_is_a_look_and_no_more(ask):
    image = turned("scene01.png", 180)
    await ask(image, MISS)
    spans = await ask(image, PRUNED_HIT)
    (look,) = spans["cache_get"]
    assert look.attributes["hiprune.cache.level"] == "pruned"
    assert look.attributes["hiprune.cache.outcome"] == "hit"


async def test_a_picture_that_cannot_be_read_fails_in_preprocess_and_in_nobody_elses_words(
    ask, observed, ours
):
    with pytest.raises(InvalidInput):
        await ask.begin(b"a canary that is no picture")
    spans = await whole(observed, ours.get_finished_spans(), FAILED)
    for name, kind in (("preprocess", "InvalidInput"), ("encode", "InvalidInput"), ("prune", "InvalidInput")):
        (span,) = spans[name]
        assert (span.status, span.description) == (2, kind)
    for name in ("AskImage", "PruneImage", "EncodeImage"):
        (server,), (caller,) = spans[name], spans[f"{name} (call)"]
        # a client's mistake is an error of the call, and none of the server's
        assert (server.status, caller.status) == (0, 2)
        assert server.attributes["rpc.grpc.status_code"] == 3
        assert server.attributes["error.type"] == "IMAGE_UNREADABLE"
        assert caller.description == "INVALID_ARGUMENT"


@contextmanager
def paused(process) -> Iterator[None]:
    """Stops a process, so that what arrives meanwhile arrives together."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


async def together(ask, observed, ours, *images: bytes) -> list[list[ReadableSpan]]:
    """Asks about several pictures while the encoder is held; gives each request's own spans."""
    ours.clear()
    with paused(observed.stack.processes["encoder"]):
        asking = [asyncio.create_task(ask.begin(image)) for image in images]
        await asyncio.sleep(1)
    await asyncio.gather(*asking)
    return [[span] for span in ours.get_finished_spans()]


async def test_requests_of_one_batch_each_have_it_in_their_own_trace(ask, observed, ours):
    first, second = await together(
        ask, observed, ours, turned("scene02.png", 180), turned("scene03.png", 180)
    )
    one, other = await whole(observed, first, MISS), await whole(observed, second, MISS)
    (vision,), (again,) = one["vision"], other["vision"]
    assert vision.attributes["hiprune.batch.items"] == again.attributes["hiprune.batch.items"] == 2
    assert abs(vision.start_ns - again.start_ns) < 1_000_000  # the same moment, read twice
    assert vision.trace != again.trace


async def test_who_joins_anothers_encoding_is_linked_to_it(ask, observed, ours):
    image = turned("scene03.png", 90)
    mine = await together(ask, observed, ours, image, image)
    traces = [f"{spans[0].get_span_context().trace_id:032x}" for spans in mine]

    def led() -> list[str]:
        return [span.trace for span in observed.collector.spans if span.name == "EncodeImage"]

    assert await asyncio.to_thread(observed.collector.wait, lambda: bool({*traces} & {*led()}))
    leader = next(each for each, trace in enumerate(traces) if trace in led())
    of_leader = await whole(observed, mine[leader], MISS)
    of_follower = await whole(observed, mine[1 - leader], FOLLOWER)
    (encode,), (joined,) = of_leader["encode"], of_follower["encode"]
    assert joined.links == (encode.id,)


async def test_each_service_alone_traces_its_own_methods(observed, ours):
    """GenerateText and PruneTokens, of tokens that the encoder gave; and what each says of itself."""
    media = media_pb2.Media(image=turned("scene00.png", 270))
    stack = observed.stack
    async with (
        connect(stack.encoder_address) as to_encoder,
        connect(stack.pruner_address) as to_pruner,
        connect(stack.address) as to_llm,
    ):
        encoder = encoder_service_pb2_grpc.EncoderServiceStub(to_encoder)
        pruner = pruner_service_pb2_grpc.PrunerServiceStub(to_pruner)
        llm = llm_service_pb2_grpc.LanguageModelServiceStub(to_llm)
        for method, request in (
            (encoder.GetEncoder, encoder_service_pb2.GetEncoderRequest()),
            (pruner.GetPruner, pruner_service_pb2.GetPrunerRequest()),
            (llm.GetLanguageModel, llm_service_pb2.GetLanguageModelRequest()),
        ):
            ours.clear()
            await call(method, request, object, peer="service")
            name = type(request).__name__.removesuffix("Request")
            expected = {("", f"{name} (call)"), (f"{name} (call)", name)}
            await whole(observed, ours.get_finished_spans(), expected)

        encoded = await encoder.EncodeImage(
            encoder_service_pb2.EncodeImageRequest(media=media, layers=[1, 2], aligned=True), timeout=30
        )
        request = pruner_service_pb2.PruneTokensRequest(
            views=encoded.views,
            policy=pruner_service_pb2.PrunePolicy(method=PLUS_PLUS),
            question=QUESTION,
            vision_digest=encoded.fingerprint.vision_digest,
        )
        ours.clear()
        await call(pruner.PruneTokens, request, object, peer="pruner")
        name = "PruneTokens"
        expected = {("", f"{name} (call)"), (f"{name} (call)", name)} | TOKENS
        await whole(observed, ours.get_finished_spans(), expected)

        pruned = await pruner.PruneImage(pruner_service_pb2.PruneImageRequest(media=media), timeout=30)
        message = llm_service_pb2.Message(
            role=llm_service_pb2.ROLE_USER,
            parts=[
                llm_service_pb2.Part(pruned_media=pruned.media),
                llm_service_pb2.Part(text=QUESTION),
            ],
        )
        # without a caller's trace, the service's own span begins one
        before = len(observed.collector.spans)
        async for _ in llm.GenerateText(llm_service_pb2.GenerateTextRequest(messages=[message]), timeout=30):
            pass

    def begun() -> list[Seen]:
        spans = observed.collector.spans[before:]
        ids = {span.trace for span in spans if span.name == "GenerateText"}
        return [span for span in spans if span.trace in ids]

    expected = {("", "GenerateText")} | GENERATED
    await asyncio.to_thread(observed.collector.wait, lambda: edges(begun()) >= expected)
    assert edges(begun()) == expected
