"""What takes traces and metrics out of a process: to an OTLP collector, and to whoever scrapes.

Set up once, at start, from the settings; without any of them nothing is made and nothing runs. Logs go to
standard error alone, see `logs`: whatever runs the process collects them.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

from opentelemetry import metrics, trace

from hiprune import telemetry
from hiprune.config import ConfigError, ProcessSettings
from hiprune.telemetry import names

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    from hiprune.telemetry.scrape import ScrapeServer

log = logging.getLogger("hiprune.telemetry")

FLUSH_S: Final = 3.0
"""For what has not been sent when the process ends: a collector that is away holds nobody up for longer."""


class Exporters:
    """A process's exporters, which end with it."""

    def __init__(self) -> None:
        self._traces: TracerProvider | None = None
        self._metrics: MeterProvider | None = None
        self._scraped: ScrapeServer | None = None

    @classmethod
    def of(cls, settings: ProcessSettings) -> Exporters:
        """Those that the settings ask for. Raises ConfigError for an address that cannot be listened on.

        What they do not say is OpenTelemetry's own to configure, by its variables: headers, certificates,
        intervals, further attributes of the resource.
        """
        made = cls()
        if settings.metrics_listen or settings.otlp_endpoint:
            resource = _resource(settings.service)
            made._set_up_metrics(settings, resource)
            if settings.otlp_endpoint:
                made._set_up_traces(settings, resource)
        return made

    def close(self, within_s: float = FLUSH_S) -> None:
        """Sends what is left, if that does not take long, and hangs up."""
        if self._scraped is not None:
            self._scraped.close()
        if self._traces is None and self._metrics is None:
            return
        # a daemon, as an exporter that cannot reach its collector goes on trying
        ending = threading.Thread(target=self._shut_down, name="flush", daemon=True)
        ending.start()
        ending.join(within_s)
        if ending.is_alive():
            log.warning("the last spans and metrics were not sent within %.0f s", within_s)

    def _shut_down(self) -> None:
        # side by side: each may have to wait for the collector
        parts = [part for part in (self._traces, self._metrics) if part is not None]
        threads = [threading.Thread(target=part.shutdown, daemon=True) for part in parts]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    def _set_up_traces(self, settings: ProcessSettings, resource: Resource) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        sampler = ParentBased(TraceIdRatioBased(settings.trace_ratio))
        self._traces = TracerProvider(sampler, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(_url(settings.otlp_endpoint))
        self._traces.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(self._traces)

    def _set_up_metrics(self, settings: ProcessSettings, resource: Resource) -> None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

        readers: list[MetricReader] = []
        if settings.otlp_endpoint:
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(_url(settings.otlp_endpoint))))
        if settings.metrics_listen:
            from hiprune.telemetry.scrape import ScrapeReader, ScrapeServer

            reader = ScrapeReader()
            host, _, port = settings.metrics_listen.rpartition(":")
            try:
                self._scraped = ScrapeServer(reader, host.strip("[]"), int(port))
            except OSError as error:
                raise ConfigError(
                    f"metrics_listen (--metrics-listen): got {settings.metrics_listen!r}, which cannot be "
                    f"bound: {error.strerror or error}"
                ) from error
            readers.append(reader)
        self._metrics = MeterProvider(readers, resource, shutdown_on_exit=False)
        metrics.set_meter_provider(self._metrics)
        telemetry.show_gauges(metrics.get_meter(names.SCOPE))
        if self._scraped is not None:
            self._scraped.start()
            log.info("metrics on http://%s/metrics", settings.metrics_listen)


def _url(endpoint: str) -> str:
    """The collector as OpenTelemetry wants it: with a scheme, which says whether it speaks TLS."""
    return endpoint if "://" in endpoint else f"http://{endpoint}"


def _resource(service: str) -> Resource:
    """Who reports: `hiprune-encoder`, the version, and which of its replicas."""
    from opentelemetry.sdk.resources import Resource

    attributes = {
        "service.name": f"hiprune-{service}",
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    with suppress(PackageNotFoundError):  # run from its sources
        attributes["service.version"] = version("hiprune")
    return Resource.create(attributes)
