"""Names of stages, spans, counters and gauges, and what reports them. Silent until `set_up` has an endpoint.

One `with stage("vision"):` both times the stage for the caller's report and opens an OpenTelemetry span.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import metrics, propagate, trace

from hiprune.v1 import encoder_service_pb2

STAGES: Final = (
    "queue",
    "preprocess",
    "vision",
    "encode",
    "text",
    "select",
    "cache_get",
    "cache_put",
    "prune",
    "project",
    "prefill",
    "decode",
)
"""Every stage a report may name; StageTiming.stage documents the same list."""

COUNTERS: Final = {
    "hiprune.requests": ("{request}", "requests admitted at the first service they reached; label tenant"),
    "hiprune.requests.rejected": (
        "{request}",
        "requests refused because a limit of their tenant's was reached; labels tenant, limit",
    ),
    "hiprune.tokens.before": ("{token}", "visual tokens before pruning; label tenant"),
    "hiprune.tokens.kept": ("{token}", "visual tokens kept of them; label tenant"),
    "hiprune.limits.fallbacks": (
        "{operation}",
        "operations on limits that this process decided alone, its Redis being slow or down",
    ),
    "hiprune.cache.lookups": (
        "{lookup}",
        "look-ups in the cache of images; labels level (encoded, pruned) and outcome (hit, miss, damaged, "
        "other_dtype)",
    ),
    "hiprune.cache.stored": ("By", "bytes stored in the cache of images; label level"),
    "hiprune.cache.failures": (
        "{operation}",
        "operations that a Redis was too slow, too full or not there for; label operation (get, put)",
    ),
    "hiprune.cache.joins": (
        "{request}",
        "requests that shared another's encoding of the same image; label scope (process, replicas)",
    ),
}
"""Every counter: its unit and what it counts."""

GAUGES: Final = {
    "hiprune.engine.blocks_held": ("1", "share of vLLM's blocks of keys and values that answers hold"),
    "hiprune.cache.breaker": ("1", "1 while a Redis that failed is left alone, else 0"),
}
"""Every gauge: its unit and what it tells."""


class StageClock:
    """Stages of one request in the order in which they ended: (name, seconds)."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, float]] = []

    def add(self, name: str, seconds: float) -> None:
        """Records a stage that was timed elsewhere. `name` is one of STAGES."""
        if name not in STAGES:
            raise ValueError(f"stage {name!r} is not declared in hiprune.telemetry.STAGES")
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
def stage(name: str) -> Iterator[None]:
    """Times a stage into the request's clock and spans it.

    Of an error the span tells the kind alone: its text may hold a client's words, and whoever reads traces
    is not to read those.
    """
    clock = _clock.get()
    started = time.perf_counter()
    tracer = trace.get_tracer("hiprune")
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield
        except Exception as error:
            span.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            if clock is not None:
                clock.add(name, time.perf_counter() - started)


def count(name: str, amount: int = 1, **labels: str) -> None:
    """Adds to a counter. `name` is one of COUNTERS; every label's values are few."""
    _counter(name).add(amount, labels)


@cache
def _counter(name: str) -> metrics.Counter:
    if name not in COUNTERS:
        raise ValueError(f"counter {name!r} is not declared in hiprune.telemetry.COUNTERS")
    unit, meaning = COUNTERS[name]
    return metrics.get_meter("hiprune").create_counter(name, unit, meaning)


def measure(name: str, value: float) -> None:
    """Sets a gauge. `name` is one of GAUGES."""
    _gauge(name).set(value)


@cache
def _gauge(name: str) -> Any:  # OpenTelemetry's class has no public name
    if name not in GAUGES:
        raise ValueError(f"gauge {name!r} is not declared in hiprune.telemetry.GAUGES")
    unit, meaning = GAUGES[name]
    return metrics.get_meter("hiprune").create_gauge(name, unit, meaning)


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """W3C trace context of the current span, as gRPC metadata."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


def adopt(metadata: Mapping[str, str]) -> None:
    """Continues the caller's trace in the current request."""
    otel_context.attach(propagate.extract(metadata))


def set_up(service: str, otlp_endpoint: str) -> None:
    """Exports traces of `service` to an OTLP collector; does nothing when the endpoint is empty."""
    if not otlp_endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"hiprune-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint, insecure=True)))
    trace.set_tracer_provider(provider)
