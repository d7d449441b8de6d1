"""`/metrics` for Prometheus: what OpenTelemetry has counted, in the text format or OpenMetrics.

Written by prometheus_client, whose OpenMetrics carries exemplars; OpenTelemetry's own exporter for Prometheus
drops them (open-telemetry/opentelemetry-python#4178). Names are those of `names.prometheus_name`.
"""

from __future__ import annotations

import socket
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    NumberDataPoint,
    Sum,
)
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from hiprune.telemetry import names

_IDLE_S: Final = 10.0
"""How long a connection may say nothing."""


class ScrapeReader(MetricReader):
    """Keeps what was collected last, for whoever asked."""

    def __init__(self) -> None:
        super().__init__()
        self._found: MetricsData | None = None
        self._lock = threading.Lock()

    def read(self) -> MetricsData | None:
        """All metrics as they are now; None before there are any."""
        with self._lock:
            self._found = None
            self.collect()
            return self._found

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 0, **kwargs: Any) -> None:
        self._found = metrics_data

    def shutdown(self, timeout_millis: float = 0, **kwargs: Any) -> None:
        """Nothing is held."""


class ScrapeServer:
    """An HTTP server of one page, in threads of its own."""

    def __init__(self, reader: ScrapeReader, host: str, port: int) -> None:
        """Raises OSError where the address cannot be listened on."""
        registry = CollectorRegistry()
        registry.register(_Metrics(reader))
        ProcessCollector(registry=registry)  # memory, CPU time and open files, where the system tells
        server = type("Server", (ThreadingHTTPServer,), {"address_family": _family(host)})
        self._server: ThreadingHTTPServer = server((host, port), _handler(registry))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Answers from now on."""
        self._thread.start()

    def close(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()


def _family(host: str) -> int:
    return int(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _handler(registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _IDLE_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            body = encode(registry)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def version_string(self) -> str:
            return "hiprune"

        def log_message(self, format: str, *args: Any) -> None:
            """A scrape is no news."""

    return Handler


class _Metrics(Collector):
    def __init__(self, reader: ScrapeReader) -> None:
        self._reader = reader

    def collect(self) -> Iterable[Family]:
        data = self._reader.read()
        return families(data) if data is not None else ()

    def describe(self) -> Iterable[Family]:
        return ()  # or the registry would collect before there is anything


def families(data: MetricsData) -> Iterator[Family]:
    """OpenTelemetry's metrics as prometheus_client has them, the resource as `target_info`."""
    for number, resource in enumerate(data.resource_metrics):
        if number == 0:
            target = Family("target", "Who is asked", "info")
            labels = {
                name.replace(".", "_"): str(value) for name, value in resource.resource.attributes.items()
            }
            target.add_sample("target_info", labels, 1.0)
            yield target
        for scope in resource.scope_metrics:
            if scope.scope.name == names.SCOPE:
                yield from map(_family_of, scope.metrics)


def _family_of(metric: Metric) -> Family:
    match metric.data:
        case Sum(data_points=points):
            name = names.prometheus_name(metric.name, "counter", metric.unit or "")
            family = Family(name, metric.description or "", "counter")
            for point in points:
                family.add_sample(f"{name}_total", _labels(point), point.value)
        case Gauge(data_points=points):
            name = names.prometheus_name(metric.name, "gauge", metric.unit or "")
            family = Family(name, metric.description or "", "gauge")
            for point in points:
                family.add_sample(name, _labels(point), point.value)
        case Histogram(data_points=points):
            name = names.prometheus_name(metric.name, "histogram", metric.unit or "")
            family = Family(name, metric.description or "", "histogram")
            for each in points:
                _add_buckets(family, name, each)
        case _:
            raise TypeError(f"{metric.name}: no metric of ours is a {type(metric.data).__name__}")
    return family


def _add_buckets(family: Family, name: str, point: HistogramDataPoint) -> None:
    labels = _labels(point)
    exemplars = {bisect_left(point.explicit_bounds, each.value): each for each in point.exemplars}
    total = 0
    bounds = (*point.explicit_bounds, float("inf"))
    for place, (bound, count) in enumerate(zip(bounds, point.bucket_counts, strict=True)):
        total += count
        found = exemplars.get(place)
        shown = None
        if found is not None and found.trace_id and found.span_id:
            ids = {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}
            shown = Exemplar(ids, found.value, found.time_unix_nano / 1e9)
        le = "+Inf" if bound == float("inf") else str(bound)
        family.add_sample(f"{name}_bucket", {**labels, "le": le}, total, exemplar=shown)
    family.add_sample(f"{name}_count", labels, point.count)
    family.add_sample(f"{name}_sum", labels, point.sum)


def _labels(point: NumberDataPoint | HistogramDataPoint) -> dict[str, str]:
    return {name: str(value) for name, value in (point.attributes or {}).items()}
