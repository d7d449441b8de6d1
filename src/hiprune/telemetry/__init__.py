"""What code calls to be seen from outside: stages, RPCs, counters, histograms, gauges. Silent by default.

One `with stage("vision"):` times a stage for the caller's report, opens an OpenTelemetry span and feeds a
histogram. Nothing here exports: see `exporters`, and `logs`. Names are declared in `names`, and any other is
refused. No record holds what a client sent or got: names, kinds, counts and times alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from types import TracebackType
from typing import Final, NamedTuple, Self

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hiprune import deadlines
from hiprune.errors import HipruneError
from hiprune.telemetry import names
from hiprune.telemetry.names import COUNTERS, GAUGES, HISTOGRAMS, STAGES
from hiprune.v1 import encoder_service_pb2

__all__ = ["COUNTERS", "GAUGES", "HISTOGRAMS", "STAGES"]  # and what is defined here

_access = logging.getLogger("hiprune.access")
_AT_ONCE_S: Final = 0.02
"""What a deadline and the cancelling at it may lie apart."""
_CONTEXT_HEADERS: Final = ("traceparent", "tracestate")
_SERVERS_FAULT: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes that make a server's span an error; any but OK makes a caller's one. Source: OpenTelemetry's semantic
conventions for gRPC."""


# --- stages ------------------------------------------------------------------------------------------------


class StageClock:
    """Stages of one request in the order in which they ended: (name, seconds)."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, float]] = []

    def add(self, name: str, seconds: float) -> None:
        """Records a stage that was timed elsewhere. `name` is one of STAGES."""
        if name not in STAGES:
            raise ValueError(f"stage {name!r} is not declared in hiprune.telemetry.names.STAGES")
        self.entries.append((name, seconds))

    def extend(self, timings: Iterable[encoder_service_pb2.StageTiming]) -> None:
        """Takes over a peer's timings."""
        for timing in timings:
            self.entries.append((timing.stage, timing.duration.ToMicroseconds() / 1e6))

    def to_proto(self) -> list[encoder_service_pb2.StageTiming]:
        """The stages as the wire has them."""
        timings = []
        for name, seconds in self.entries:
            timing = encoder_service_pb2.StageTiming(stage=name)
            timing.duration.FromMicroseconds(int(seconds * 1e6))
            timings.append(timing)
        return timings


_clock: ContextVar[StageClock | None] = ContextVar("hiprune_stage_clock", default=None)


def start_clock() -> StageClock:
    """A fresh clock for the current request; `stage` records into it."""
    clock = StageClock()
    _clock.set(clock)
    return clock


@contextmanager
def stage(name: str, attributes: Mapping[str, str | int] | None = None) -> Iterator[Span]:
    """Times a stage into the request's clock and the histogram, and spans it.

    Of an error the span tells the kind alone: its text may hold a client's words, and whoever reads traces
    is not to read those.
    """
    clock = _clock.get()
    started = time.perf_counter()
    with _tracer().start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except BaseException as error:
            span.set_status(_failure(error))
            raise
        finally:
            seconds = time.perf_counter() - started
            if clock is not None:
                clock.add(name, seconds)
            observe("hiprune.stage.duration", seconds, stage=name)


def record(
    name: str,
    started_s: float,
    seconds: float,
    *,
    attributes: Mapping[str, str | int] | None = None,
    error: BaseException | None = None,
    parent: Span | None = None,
) -> Span:
    """Spans what was timed elsewhere, such as in a batch for several requests; returns the ended span.

    `started_s` is by `time.perf_counter`. The parent is the current span where no other is given. The
    request's clock is the caller's to feed.
    """
    start_ns = time.time_ns() - int((time.perf_counter() - started_s) * 1e9)
    context = None if parent is None else trace.set_span_in_context(parent)
    span = _tracer().start_span(name, context, attributes=attributes, start_time=start_ns)
    if error is not None:
        span.set_status(_failure(error))
    own = trace.set_span_in_context(span, context)
    _histogram("hiprune.stage.duration").record(seconds, _checked("hiprune.stage.duration", stage=name), own)
    span.end(start_ns + int(seconds * 1e9))
    return span


def _failure(error: BaseException) -> Status:
    return Status(StatusCode.ERROR, type(error).__name__)


class Note(NamedTuple):
    """A part of a batch that was timed for several requests at once."""

    started_s: float
    """By `time.perf_counter`."""
    seconds: float
    layer: int


_notes: ContextVar[list[Note] | None] = ContextVar("hiprune_notes", default=None)


@contextmanager
def noting() -> Iterator[list[Note]]:
    """What `note` notes inside the block, in this thread."""
    found: list[Note] = []
    token = _notes.set(found)
    try:
        yield found
    finally:
        _notes.reset(token)


@contextmanager
def note(layer: int) -> Iterator[None]:
    """Times what a batch does for one layer, where somebody is `noting`."""
    notes = _notes.get()
    started = time.perf_counter()
    yield
    if notes is not None:
        notes.append(Note(started, time.perf_counter() - started, layer))


@cache
def _tracer() -> trace.Tracer:
    return trace.get_tracer(names.SCOPE)


# --- RPCs --------------------------------------------------------------------------------------------------


class Served:
    """Around a request where it is served: continues its caller's trace, spans it, and counts how it ended.

    with Served("/hiprune.v1.PrunerService/PruneImage", context.invocation_metadata()) as request:
        …
        request.failed(grpc.StatusCode.INVALID_ARGUMENT, "MISSING_FIELD")
    """

    def __init__(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        self._service, _, self.rpc = method.removeprefix("/").rpartition("/")
        self._metadata = metadata or ()
        self.code = grpc.StatusCode.OK
        self.reason = ""
        self.tenant = ""
        """Known once the request has been let in."""
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self.started_s = time.perf_counter()
        carrier = {key: value for key, value in self._metadata if key in _CONTEXT_HEADERS}
        # an empty context: what is current here is the server's own, and nobody's trace
        caller = TraceContextTextMapPropagator().extract(carrier, Context())
        self._span = _rpc_span(self._service, self.rpc, SpanKind.SERVER, caller)
        self._before = otel_context.attach(trace.set_span_in_context(self._span, caller))
        self._outer = _served.set(self)
        return self

    def failed(self, code: grpc.StatusCode, reason: str) -> None:
        """The request ends with an error."""
        self.code, self.reason = code, reason

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None and self.code is grpc.StatusCode.OK:
            # cancelled from outside: by gRPC at the deadline, or as nobody waits for the answer
            if (left := deadlines.remaining_s()) is not None and left < _AT_ONCE_S:
                self.failed(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
            else:
                self.failed(grpc.StatusCode.CANCELLED, "CLIENT_LEFT")
        self.seconds = time.perf_counter() - self.started_s
        observe("hiprune.rpc.duration", self.seconds, rpc=self.rpc, code=self.code.name)
        if self.code is not grpc.StatusCode.OK:
            reason = self.reason if self.reason in names.REASONS else "OTHER"
            count("hiprune.errors", rpc=self.rpc, code=self.code.name, reason=reason)
            self._span.set_attribute("error.type", reason)
        if self.tenant:
            self._span.set_attribute("hiprune.tenant", self.tenant)
        self._tell()
        _end(self._span, self.code, is_error=self.code.name in _SERVERS_FAULT)
        _served.reset(self._outer)
        otel_context.detach(self._before)

    def _tell(self) -> None:
        """The request's line in the log: which RPC, how it ended, how long it took, and whose it was."""
        if not _access.isEnabledFor(logging.INFO):
            return
        fields: dict[str, str | float] = {
            "rpc": self.rpc,
            "code": self.code.name,
            "ms": round(1000 * self.seconds, 3),
        }
        text = f"{self.rpc} {self.code.name} in {1000 * self.seconds:.1f} ms"
        for name, value in (("reason", self.reason), ("tenant", self.tenant)):
            if value:
                fields[name] = value
                text += f" {name}={value}"
        _access.info("%s", text, extra={"fields": fields})


_served: ContextVar[Served | None] = ContextVar("hiprune_served", default=None)


def current() -> Served | None:
    """The request being served; None outside of one."""
    return _served.get()


class Call:
    """Around a call of a service's method: `with Call(request) as metadata:`. What is yielded goes along.

    Touches no context variable, so that the block may yield.
    """

    def __init__(self, request: Message) -> None:
        service, rpc = _method_of(request.DESCRIPTOR)
        self._span = _rpc_span(service, rpc, SpanKind.CLIENT)

    def __enter__(self) -> tuple[tuple[str, str], ...]:
        return _metadata(trace.set_span_in_context(self._span))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        code = _code_of(error)
        _end(self._span, code, is_error=code is not grpc.StatusCode.OK)


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """W3C trace context of the current span, as gRPC metadata."""
    return _metadata(None)


def link(to: trace.SpanContext) -> None:
    """Points from the current span to another request's, whose work this one shares."""
    span = trace.get_current_span()
    if span.is_recording() and to.is_valid:
        span.add_link(to)


def _metadata(context: Context | None) -> tuple[tuple[str, str], ...]:
    # trace context alone: baggage would carry a stranger's words from service to service
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return tuple(carrier.items())


def _rpc_span(service: str, rpc: str, kind: SpanKind, context: Context | None = None) -> Span:
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": rpc}
    return _tracer().start_span(f"{service}/{rpc}", context, kind, attributes)


def _end(span: Span, code: grpc.StatusCode, *, is_error: bool) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if is_error:
        span.set_status(Status(StatusCode.ERROR, code.name))
    span.end()


def _code_of(error: BaseException | None) -> grpc.StatusCode:
    """The status of a call that ended so."""
    match error:
        case None:
            return grpc.StatusCode.OK
        case grpc.aio.AioRpcError():
            return error.code()
        case HipruneError():
            return error.code
        case asyncio.CancelledError() | GeneratorExit():
            return grpc.StatusCode.CANCELLED
        case _:
            return grpc.StatusCode.UNKNOWN


@cache
def _method_of(request: Descriptor) -> tuple[str, str]:
    """Service and name of the method that takes a request; each of ours has a type of its own."""
    for service in request.file.services_by_name.values():
        for method in service.methods:
            if method.input_type is request:
                return service.full_name, method.name
    return "", request.name


# --- metrics -----------------------------------------------------------------------------------------------


def count(name: str, amount: float = 1, **labels: str) -> None:
    """Adds to a counter, one of COUNTERS, under the labels and values that it declares."""
    _counter(name).add(amount, _checked_counter(name, **labels))


def observe(name: str, value: float, **labels: str) -> None:
    """Adds a value to a histogram, one of HISTOGRAMS; a sampled span that is current is its exemplar."""
    _histogram(name).record(value, _checked(name, **labels))


_watched: dict[str, dict[tuple[tuple[str, str], ...], Callable[[], float]]] = {}


def watch(name: str, read: Callable[[], float], **labels: str) -> None:
    """Has a gauge, one of GAUGES, read whenever somebody looks, in a thread of theirs: until then it is free.

    Of several that watch one gauge under the same labels, the last one counts.
    """
    names.check(name, "gauge", labels)
    _watched.setdefault(name, {})[tuple(sorted(labels.items()))] = read


def measure(name: str, value: float, **labels: str) -> None:
    """Sets a gauge to what it is from now on."""
    watch(name, lambda: value, **labels)


def show_gauges(meter: metrics.Meter) -> None:
    """Lets a meter read every gauge that is watched, now or later."""
    for name, declared in GAUGES.items():
        meter.create_observable_gauge(name, [_reader_of(name)], declared.unit, declared.meaning)


def _reader_of(name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def read(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value(), dict(labels)) for labels, value in list(_watched.get(name, {}).items())]

    return read


def first_token() -> None:
    """The first token of the current request's answer is there."""
    request = _served.get()
    if request is not None:
        seconds = time.perf_counter() - request.started_s
        observe("hiprune.time_to_first_token", seconds, rpc=request.rpc)


@lru_cache(1024)
def _checked_counter(name: str, **labels: str) -> Mapping[str, str]:
    names.check(name, "counter", labels)
    return labels


@lru_cache(1024)
def _checked(name: str, **labels: str) -> Mapping[str, str]:
    names.check(name, "histogram", labels)
    return labels


@cache
def _counter(name: str) -> metrics.Counter:
    if name not in COUNTERS:
        raise ValueError(f"counter {name!r} is not declared in hiprune.telemetry.names.COUNTERS")
    return metrics.get_meter(names.SCOPE).create_counter(name, COUNTERS[name].unit, COUNTERS[name].meaning)


@cache
def _histogram(name: str) -> metrics.Histogram:
    if name not in HISTOGRAMS:
        raise ValueError(f"histogram {name!r} is not declared in hiprune.telemetry.names.HISTOGRAMS")
    declared = HISTOGRAMS[name]
    return metrics.get_meter(names.SCOPE).create_histogram(
        name, declared.unit, declared.meaning, explicit_bucket_boundaries_advisory=declared.buckets
    )
