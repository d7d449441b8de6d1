"""An OTLP collector that keeps what it is sent, and what tests ask of it. Real gRPC, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from hiprune.telemetry import names

CALLER = trace_pb2.Span.SPAN_KIND_CLIENT


@dataclass(frozen=True)
class Seen:
    """A span as it arrived. Ids are hexadecimal; `name` is a node's of `names.EDGES`."""

    name: str
    service: str
    trace: str
    id: str
    parent: str
    status: int
    description: str
    attributes: dict[str, Any]
    links: tuple[str, ...]
    """Ids of the spans that it points to."""
    start_ns: int
    end_ns: int


def node(name: str, *, calls: bool) -> str:
    """What EDGES calls a span: an RPC's by the method, a caller's `RPC (call)`."""
    method = name.rpartition("/")[2]
    return f"{method} (call)" if calls else method


@dataclass
class Collector:
    """`with running() as collector: …  # collector.address`."""

    address: str
    spans: list[Seen] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    """Every request as it came: what a leak would be in."""
    metrics: list[metrics_service_pb2.ExportMetricsServiceRequest] = field(default_factory=list)

    def of_trace(self, trace: str) -> list[Seen]:
        """The spans of a trace that have arrived."""
        return [span for span in list(self.spans) if span.trace == trace]

    def wait(self, met: Callable[[], bool], timeout_s: float = 20.0) -> bool:
        """Whether something becomes true of what arrives. Blocks."""
        until = time.monotonic() + timeout_s
        while not met() and time.monotonic() < until:
            time.sleep(0.02)
        return met()


def edges(spans: Iterable[Seen]) -> set[tuple[str, str]]:
    """Parent and child by name; the parent of a span whose parent is not among them is empty."""
    by_id = {span.id: span for span in spans}
    return {(by_id[span.parent].name if span.parent in by_id else "", span.name) for span in by_id.values()}


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request, context):
        self._collector.raw.append(request.SerializeToString())
        for resource in request.resource_spans:
            who = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                assert scope.scope.name == names.SCOPE
                self._collector.spans += [_seen(span, who["service.name"]) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request, context):
        self._collector.raw.append(request.SerializeToString())
        self._collector.metrics.append(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _seen(span: trace_pb2.Span, service: str) -> Seen:
    return Seen(
        node(span.name, calls=span.kind == CALLER),
        service,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.status.code,
        span.status.message,
        {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes},
        tuple(link.span_id.hex() for link in span.links),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
    )


@contextmanager
def running() -> Iterator[Collector]:
    """A collector on a port of its own."""
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(collector), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(collector), server)
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)
