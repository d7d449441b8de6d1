"""Claims about what is counted for tenants and told of a request to whoever reads traces and logs: with
OpenTelemetry's own SDK, over real gRPC, and a real Redis that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import date

import grpc
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hiprune import auth, quotas, telemetry
from hiprune.auth import KEY_HEADER, PEER_HEADER, TENANT_HEADER, Limits, Rules, Tenant
from hiprune.door import Door
from hiprune.errors import Exhausted, Internal, InvalidInput, Unavailable
from hiprune.limit_stores import RedisStore
from hiprune.quotas import Quotas
from hiprune.server import RequestGate
from hiprune.tenants import Tenants, new_key
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc

BEFORE, KEPT = 196, 65
TOKEN = "a token of sixteen and more"
Counts = dict[tuple[str, ...], int]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counts]:
    """What a reader of metrics sees now: (name, label values in the labels' order) and its sum."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    forget_instruments()

    def read() -> Counts:
        data = reader.get_metrics_data()
        found: Counts = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if metric.name in telemetry.HISTOGRAMS or metric.name == "hiprune.errors":
                        continue  # of every request, whosever it is
                    assert metric.unit == telemetry.COUNTERS[metric.name].unit
                    for point in metric.data.data_points:
                        labels = (str(value) for _, value in sorted(point.attributes.items()))
                        found[metric.name.removeprefix("hiprune."), *labels] = int(point.value)
        return found

    yield read
    forget_instruments()
    provider.shutdown()


def forget_instruments() -> None:
    """What is recorded next asks OpenTelemetry anew."""
    for made in (telemetry._counter, telemetry._histogram, telemetry._tracer):
        made.cache_clear()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that end."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    forget_instruments()
    yield exporter
    forget_instruments()


class Encoder(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Charges each request as the services do, and holds it while told to."""

    def __init__(self) -> None:
        self.going = asyncio.Event()
        self.going.set()
        self.inside = 0

    async def EncodeImage(self, request, context):
        self.inside += 1
        await self.going.wait()
        await quotas.current().reserve(KEPT, BEFORE)
        return encoder_service_pb2.EncodeImageResponse()

    def register(self, server: grpc.aio.Server) -> None:
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)


def accounts(**limits: Limits) -> tuple[dict[str, str], Tenants]:
    """Keys by name, and the tenants to whom they belong."""
    keys, by_name, by_id = {}, {}, {}
    for name, each in limits.items():
        keys[name], entry = new_key(date(2026, 11, 22))
        by_name[name] = Tenant(name, each)
        by_id[entry.id] = entry, by_name[name]
    return keys, Tenants(by_name, by_id)


@pytest.fixture
def start(serve):
    """Starts a service with a door: what calls it, with a key or other metadata."""

    async def begin(encoder: Encoder, rules: Rules, store: RedisStore | None = None):
        gate = RequestGate(30, Door(rules, Quotas(store)))
        gate.open()
        stub = encoder_service_pb2_grpc.EncoderServiceStub(await serve(encoder.register, gate=gate))

        async def ask(key: str = "", *metadata: tuple[str, str]) -> grpc.StatusCode:
            said = ((KEY_HEADER, f"Bearer {key}"), *metadata) if key else metadata
            try:
                await stub.EncodeImage(encoder_service_pb2.EncodeImageRequest(), metadata=said)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        return ask

    return begin


OK, EXHAUSTED = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_usage_and_refusals_are_counted_by_tenant_and_limit(start, counts):
    keys, tenants = accounts(
        busy=Limits(requests_per_minute=2),
        wordy=Limits(tokens_per_minute=KEPT),
        eager=Limits(concurrency=1),
        free=Limits(),
    )
    encoder = Encoder()
    ask = await start(encoder, Rules(tenants))
    assert [await ask(keys["busy"]) for _ in range(3)] == [OK, OK, EXHAUSTED]
    assert [await ask(keys["wordy"]) for _ in range(2)] == [OK, EXHAUSTED]
    assert [await ask(keys["free"]) for _ in range(4)] == [OK] * 4
    encoder.going.clear()
    encoder.inside = 0
    held = asyncio.create_task(ask(keys["eager"]))
    async with asyncio.timeout(10):
        while not encoder.inside:  # noqa: ASYNC110  # on the other side of a socket
            await asyncio.sleep(0.01)
    assert await ask(keys["eager"]) is EXHAUSTED
    encoder.going.set()
    assert await held is OK
    assert counts() == {
        ("requests", "busy"): 2,
        ("requests", "wordy"): 1,  # who has no tokens left is not let in
        ("requests", "free"): 4,
        ("requests", "eager"): 1,
        ("requests.rejected", "requests_per_minute", "busy"): 1,
        ("requests.rejected", "tokens_per_minute", "wordy"): 1,
        ("requests.rejected", "concurrency", "eager"): 1,
        **{("tokens.before", name): BEFORE * n for name, n in usage().items()},
        **{("tokens.kept", name): KEPT * n for name, n in usage().items()},
    }


def usage() -> dict[str, int]:
    return {"busy": 2, "wordy": 1, "free": 4, "eager": 1}


async def test_nobody_can_make_up_a_label(start, counts):
    """The names of tenants in metrics are the file's, and `anonymous`: not what strangers or peers send."""
    keys, tenants = accounts(acme=Limits(requests_per_minute=1))
    ask = await start(Encoder(), Rules(tenants, peer_token=TOKEN, allow_anonymous=True))
    assert await ask() is OK
    assert [await ask(keys["acme"]) for _ in range(2)] == [OK, EXHAUSTED]
    for number in range(20):
        assert await ask(new_key(date(2026, 11, 22))[0]) is grpc.StatusCode.UNAUTHENTICATED
        name = (TENANT_HEADER, f"made-up-{number}")
        assert await ask("", name) is grpc.StatusCode.PERMISSION_DENIED
        assert await ask("", name, (PEER_HEADER, TOKEN)) is OK  # counted where the peer was asked first
    assert {labels[-1] for labels in counts()} == {"acme", auth.ANONYMOUS_TENANT}
    assert len(counts()) == 2 * 3 + 1


async def test_with_redis_down_limits_hold_in_the_process_and_a_metric_says_so(start, counts, start_redis):
    url, process = start_redis()
    keys, tenants = accounts(acme=Limits(requests_per_minute=3))
    ask = await start(Encoder(), Rules(tenants), RedisStore(url))
    assert await ask(keys["acme"]) is OK
    assert ("limits.fallbacks",) not in counts()
    process.kill()
    process.wait()
    # the count begins anew in the process: that is the price, and it is as strict as before
    assert [await ask(keys["acme"]) for _ in range(4)] == [OK, OK, OK, EXHAUSTED]
    seen = counts()
    assert seen["limits.fallbacks",] == 4
    assert seen["requests.rejected", "requests_per_minute", "acme"] == 1
    assert seen["requests", "acme"] == 4


def test_a_span_tells_the_kind_of_an_error_and_nothing_of_its_text(spans):
    with pytest.raises(InvalidInput), telemetry.stage("text"):
        raise InvalidInput("what the canary asked", field="question")
    with telemetry.stage("select"):
        pass
    failed, fine = spans.get_finished_spans()
    assert (failed.name, failed.status.status_code.name) == ("text", "ERROR")
    assert failed.status.description == "InvalidInput"
    assert fine.status.is_ok or fine.status.is_unset
    assert "canary" not in failed.to_json()


# --- a request, from outside -------------------------------------------------------------------------------

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)


class Ending(Encoder):
    """Ends as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.passed_on: tuple[tuple[str, str], ...] = ()

    async def EncodeImage(self, request, context):
        self.passed_on = telemetry.outgoing_metadata()
        if self.error is not None:
            raise self.error
        await self.going.wait()
        return encoder_service_pb2.EncodeImageResponse()


@pytest.fixture
async def ending(serve, counts, spans, caplog):
    """A service, and how a request to it ended: its span, its line in the log, what was counted."""
    service = Ending()
    caplog.set_level("INFO", "hiprune.access")
    stub = encoder_service_pb2_grpc.EncoderServiceStub(await serve(service.register))

    async def ask(error: Exception | None = None, **options):
        service.error = error
        try:
            await stub.EncodeImage(encoder_service_pb2.EncodeImageRequest(), **options)
        except grpc.aio.AioRpcError as refused:
            return refused.code()
        return grpc.StatusCode.OK

    def lines():
        return [line for line in caplog.records if line.name == "hiprune.access"]

    async def told():
        async with asyncio.timeout(10):
            while not (lines() and spans.get_finished_spans()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the client is told first
        (span,), (line,) = spans.get_finished_spans(), lines()
        return span, line

    ask.service, ask.told = service, told
    return ask


async def test_a_callers_trace_goes_on_and_its_baggage_does_not(ending):
    baggage = (("baggage", "question=canary"), ("tracestate", "vendor=1"))
    assert await ending(metadata=(*CALLER, *baggage)) is OK
    span, line = await ending.told()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.kind is trace.SpanKind.SERVER
    assert span.name == "hiprune.v1.EncoderService/EncodeImage"
    said = dict(ending.service.passed_on)
    assert said == {
        "traceparent": f"00-{TRACE}-{span.context.span_id:016x}-01",
        "tracestate": "vendor=1",
    }
    assert line.getMessage().startswith("EncodeImage OK in ")
    assert line.getMessage().endswith(" ms tenant=anonymous")


async def test_without_a_collector_a_trace_goes_through_all_the_same(serve):
    service = Ending()
    stub = encoder_service_pb2_grpc.EncoderServiceStub(await serve(service.register))
    await stub.EncodeImage(encoder_service_pb2.EncodeImageRequest(), metadata=CALLER)
    assert dict(service.passed_on) == dict(CALLER)


@pytest.mark.parametrize(
    ("error", "code", "reason", "faulty"),
    [
        (InvalidInput("canary", field="media"), 3, "INVALID_FIELD", False),
        (Exhausted("canary"), 8, "OVERLOADED", False),
        (Unavailable("canary", reason="ENCODER_UNREACHABLE"), 14, "ENCODER_UNREACHABLE", True),
        (Internal("canary", reason="A_STRANGERS_OWN"), 13, "OTHER", True),
        (ValueError("canary"), 13, "INTERNAL", True),
    ],
)
async def test_an_error_is_told_by_its_code_and_reason_and_never_by_its_words(
    ending, error, code, reason, faulty
):
    assert (await ending(error)).value[0] == code
    span, line = await ending.told()
    assert span.attributes["rpc.grpc.status_code"] == code
    assert span.attributes["error.type"] == reason
    assert (span.status.status_code is trace.StatusCode.ERROR) == faulty
    assert not span.events
    assert "canary" not in span.to_json()
    assert "canary" not in line.getMessage()


async def test_who_leaves_and_who_runs_out_of_time_are_told_apart(ending, spans, caplog):
    ending.service.going.clear()
    assert await ending(timeout=0.3) is grpc.StatusCode.DEADLINE_EXCEEDED
    span, _ = await ending.told()
    assert span.attributes["error.type"] == "DEADLINE_EXCEEDED"
    spans.clear()
    caplog.clear()
    asking = asyncio.create_task(ending(timeout=30))
    await asyncio.sleep(0.3)
    asking.cancel()
    span, _ = await ending.told()
    assert span.attributes["error.type"] == "CLIENT_LEFT"
    assert span.attributes["rpc.grpc.status_code"] == 1
