"""A stack that is looked at in every way there is: traces, metrics, JSON logs. Loaded as a pytest plugin."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from hiprune.stack import SERVICES, Stack, free_port
from tests import otlp

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@dataclass
class Observed:
    """The stack, its collector, and where each service is scraped."""

    stack: Stack
    collector: otlp.Collector
    ports: dict[str, int]

    def scrape(self, service: str, accept: str = OPENMETRICS, path: str = "/metrics") -> str:
        """A service's page of metrics."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[service]}{path}", headers={"Accept": accept}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def families(self, service: str) -> dict[str, Metric]:
        """The page, parsed as strictly as OpenMetrics wants it, by the families' names."""
        return {each.name: each for each in text_string_to_metric_families(self.scrape(service))}


@pytest.fixture(scope="session")
def observed() -> Iterator[Observed]:
    """Redis and the three services, of whose every request everything is told at once."""
    ports = {service: free_port() for service in SERVICES}
    with otlp.running() as collector:
        environ = {
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            # time for two requests to meet in one batch
            "HIPRUNE_ENCODER_MAX_WAIT_MS": "300",
        }
        for service in SERVICES:
            environ |= {
                f"HIPRUNE_{service.upper()}_{name}": value
                for name, value in {
                    "OTLP_ENDPOINT": collector.address,
                    "METRICS_LISTEN": f"127.0.0.1:{ports[service]}",
                    "LOG_FORMAT": "json",
                }.items()
            }
        with Stack(tcp=True, environ=environ) as stack:
            yield Observed(stack, collector, ports)
