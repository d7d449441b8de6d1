"""`/metrics` for Prometheus: what OpenTelemetry has counted, in the text format or OpenMetrics.

Written by prometheus_client, whose OpenMetrics carries exemplars; OpenTelemetry's own exporter for Prometheus
drops them (open-telemetry/opentelemetry-python#4178). Names are those of `names.prometheus_name`.
"""

from __future__ import annotations

import logging
import socket
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
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

log = logging.getLogger("hiprune.telemetry")

_MOST_S: Final = 10.0
"""How long a connection may last."""
_MOST_CONNECTIONS: Final = 8
"""At a time; more are hung up on. A scraper needs one."""


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
        server = type("Server", (_Bounded,), {"address_family": _family(host)})
        self._server: _Bounded = server((host, port), _handler(registry))
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


class _Bounded(ThreadingHTTPServer):
    """Serves few at a time, none for long, and is silent about those who hang up."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # a client that sends a byte now and then would keep its thread as long as it likes
        end = threading.Timer(_MOST_S, self.shutdown_request, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a scraper hung up", exc_info=True)


def _family(host: str) -> int:
    return int(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _handler(registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
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
    """OpenTelemetry's metrics as prometheus_client has them, the resource as `target_info`."""

    def __init__(self, reader: ScrapeReader) -> None:
        self._reader = reader
        # OpenTelemetry forgets an exemplar once it was collected; here it stays until a later one comes, so
        # that two who scrape do not take them from each other. One a bucket: no more than there are series.
        self._exemplars: dict[tuple[str, ...], Exemplar] = {}

    def collect(self) -> Iterable[Family]:
        data = self._reader.read()
        for resource in data.resource_metrics if data is not None else ():
            yield _target(resource.resource.attributes)
            for scope in resource.scope_metrics:
                if scope.scope.name == names.SCOPE:
                    yield from map(self._family_of, scope.metrics)

    def describe(self) -> Iterable[Family]:
        return ()  # or the registry would collect before there is anything

    def _family_of(self, metric: Metric) -> Family:
        about, unit = metric.description or "", metric.unit or ""
        match metric.data:
            case Sum(data_points=points):
                name = names.prometheus_name(metric.name, "counter", unit)
                family = Family(name, about, "counter")
                for point in points:
                    family.add_sample(f"{name}_total", _labels(point), point.value)
            case Gauge(data_points=points):
                name = names.prometheus_name(metric.name, "gauge", unit)
                family = Family(name, about, "gauge")
                for point in points:
                    family.add_sample(name, _labels(point), point.value)
            case Histogram(data_points=points):
                name = names.prometheus_name(metric.name, "histogram", unit)
                family = Family(name, about, "histogram")
                for each in points:
                    self._add_buckets(family, name, each)
            case _:
                raise TypeError(f"{metric.name}: no metric of ours is a {type(metric.data).__name__}")
        return family

    def _add_buckets(self, family: Family, name: str, point: HistogramDataPoint) -> None:
        labels = _labels(point)
        bounds = (*point.explicit_bounds, float("inf"))
        series = [
            (name, *labels.values(), "+Inf" if bound == float("inf") else str(bound)) for bound in bounds
        ]
        for each in point.exemplars:
            if each.trace_id and each.span_id:
                ids = {"trace_id": f"{each.trace_id:032x}", "span_id": f"{each.span_id:016x}"}
                place = bisect_left(point.explicit_bounds, each.value)
                self._exemplars[series[place]] = Exemplar(ids, each.value, each.time_unix_nano / 1e9)
        total = 0
        for bucket, count in zip(series, point.bucket_counts, strict=True):
            total += count
            own = {**labels, "le": bucket[-1]}
            family.add_sample(f"{name}_bucket", own, total, exemplar=self._exemplars.get(bucket))
        family.add_sample(f"{name}_count", labels, point.count)
        family.add_sample(f"{name}_sum", labels, point.sum)


def _target(attributes: Mapping[str, Any]) -> Family:
    family = Family("target", "Who is asked", "info")
    labels = {name.replace(".", "_"): str(value) for name, value in attributes.items()}
    family.add_sample("target_info", labels, 1.0)
    return family


def _labels(point: NumberDataPoint | HistogramDataPoint) -> dict[str, str]:
    return {name: str(value) for name, value in (point.attributes or {}).items()}
