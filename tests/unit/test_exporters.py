"""Claims about what leaves a process: the page for Prometheus, JSON lines, and nothing where nobody asked."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from hiprune import telemetry
from hiprune.config import ConfigError
from hiprune.telemetry import names
from hiprune.telemetry.exporters import Exporters
from hiprune.telemetry.logs import JsonLines
from hiprune.telemetry.scrape import ScrapeReader, ScrapeServer
from services.encoder.settings import Settings


@pytest.fixture
def page(monkeypatch):
    """A page of metrics, and the spans that may be its exemplars: `page()`, or with what is accepted."""
    reader = ScrapeReader()
    server = ScrapeServer(reader, "127.0.0.1", 0)
    provider, tracers = MeterProvider([reader]), TracerProvider()
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    monkeypatch.setattr(trace, "get_tracer", tracers.get_tracer)
    monkeypatch.setattr(telemetry, "_watched", {})
    caches = (telemetry._counter, telemetry._histogram, telemetry._tracer)
    for made in caches:
        made.cache_clear()
    telemetry.show_gauges(provider.get_meter(names.SCOPE))
    server.start()

    def read(accept: str = "application/openmetrics-text") -> str:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept})) as answer:
            return answer.read().decode()

    yield read
    server.close()
    for made in caches:
        made.cache_clear()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("hiprune_")
    }


def test_counters_histograms_and_gauges_are_on_the_page_as_they_stand(page):
    telemetry.count("hiprune.cache.stored", 1024, level="encoded")
    telemetry.count("hiprune.cache.stored", 1, level="encoded")
    telemetry.observe("hiprune.batch.items", 3)
    telemetry.observe("hiprune.batch.items", 1000)
    waiting = 7
    telemetry.watch("hiprune.queue.depth", lambda: waiting, queue="vision")
    telemetry.measure("hiprune.cache.breaker", 1)
    seen = samples(page())
    assert seen["hiprune_cache_stored_bytes_total", "encoded"] == 1025
    assert seen["hiprune_batch_items_bucket", "2.0"] == 0
    assert seen["hiprune_batch_items_bucket", "3.0"] == 1
    assert seen["hiprune_batch_items_bucket", "32.0"] == 1
    assert seen["hiprune_batch_items_bucket", "+Inf"] == seen["hiprune_batch_items_count",] == 2
    assert seen["hiprune_batch_items_sum",] == 1003
    assert seen["hiprune_queue_depth", "vision"] == 7
    waiting = 8
    telemetry.measure("hiprune.cache.breaker", 0)
    assert samples(page())["hiprune_queue_depth", "vision"] == 8
    assert samples(page())["hiprune_cache_breaker",] == 0


def test_a_stage_that_is_traced_is_its_buckets_exemplar(page):
    with telemetry.stage("select") as span:
        pass
    ids = span.get_span_context()
    shown = [
        sample.exemplar
        for family in text_string_to_metric_families(page())
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert [each.labels for each in shown] == [
        {"trace_id": f"{ids.trace_id:032x}", "span_id": f"{ids.span_id:016x}"}
    ]
    assert "span_id" not in page("text/plain")
    assert page().count("span_id") == 1  # it is there for the next who looks


def test_what_is_recorded_behind_its_time_has_that_time_and_its_exemplar(page):
    with telemetry.stage("encode") as parent:
        span = telemetry.record("vision", 100.0, 0.25, attributes={"hiprune.batch.items": 2})
        inner = telemetry.record("capture", 100.0, 0.125, parent=span)
    assert span.end_time - span.start_time == 250_000_000
    assert span.parent.span_id == parent.get_span_context().span_id
    assert inner.parent.span_id == span.get_span_context().span_id
    assert samples(page())["hiprune_stage_duration_seconds_sum", "vision"] == 0.25


def test_a_port_that_is_taken_is_a_wrong_setting():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"metrics_listen \(--metrics-listen\): got '127.0.0.1:{port}'"
        ):
            Exporters.of(Settings.read([f"--metrics-listen=127.0.0.1:{port}"], {}))
    with pytest.raises(ConfigError, match="cannot be bound"):
        Exporters.of(Settings.read(["--metrics-listen=no.such.host.invalid:9464"], {}))


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("metrics-listen", "9464", "pattern"),
        ("metrics-listen", "127.0.0.1:99999", "65535"),
        ("otlp-endpoint", "collector", "pattern"),
        ("otlp-endpoint", "grpc://collector:4317", "pattern"),
        ("otlp-endpoint", "https://collector:4317/v1", "pattern"),
        ("trace-ratio", "1.5", "less than or equal to 1"),
        ("log-format", "xml", "text|json"),
    ],
)
def test_a_wrong_setting_is_told_what_was_expected(flag, value, expected):
    with pytest.raises(ConfigError) as caught:
        Settings.read([f"--{flag}={value}"], {})
    assert f"--{flag}" in str(caught.value)
    assert expected in str(caught.value)


def test_a_collector_is_named_with_or_without_its_scheme():
    for value in ("", "collector:4317", "http://collector:4317", "https://[::1]:4317"):
        assert Settings.read([f"--otlp-endpoint={value}"], {}).otlp_endpoint == value


def test_without_settings_nothing_is_exported_and_nothing_for_it_is_loaded():
    look = """
import sys, threading
from hiprune import server  # all that a service loads of this
from hiprune.telemetry import logs
from hiprune.telemetry.exporters import Exporters
from services.encoder.settings import Settings
settings = Settings.read([], {})
logs.set_up(settings)
Exporters.of(settings).close()
costly = ("opentelemetry.sdk", "opentelemetry.exporter", "prometheus")
loaded = [name for name in sys.modules if name.startswith(costly)]
print(loaded, threading.active_count())
"""
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[] 1"


def test_a_collector_that_is_away_does_not_keep_a_process_from_ending():
    end = """
import logging, time
from hiprune import telemetry
from hiprune.telemetry.exporters import Exporters
from services.encoder.settings import Settings
logging.disable()
exporters = Exporters.of(Settings.read(["--otlp-endpoint=127.0.0.1:1", "--metrics-listen=127.0.0.1:0"], {}))
with telemetry.stage("select"):
    pass
begun = time.monotonic()
exporters.close(0.5)
assert time.monotonic() - begun < 5
"""
    subprocess.run([sys.executable, "-c", end], check=True, timeout=30)


# --- JSON lines --------------------------------------------------------------------------------------------


def line(level: int, message: str, *arguments, exc_info=None, **extra) -> dict:
    record = logging.LogRecord("hiprune.test", level, __file__, 1, message, arguments, exc_info)
    vars(record).update(extra)
    text = JsonLines("encoder").format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_record_is_one_line_of_json_whatever_is_in_it():
    found = line(logging.WARNING, 'quotes " and \n lines, %s and \udc80', "ünïcode")
    assert found["level"] == "warning"
    assert found["service"] == "encoder"
    assert found["logger"] == "hiprune.test"
    assert found["message"] == 'quotes " and \n lines, ünïcode and \udc80'
    assert found["time"].endswith("Z")
    assert "trace_id" not in found
    assert "tenant" not in found
    try:
        raise ValueError("why")
    except ValueError:
        found = line(logging.ERROR, "failed", exc_info=sys.exc_info(), fields={"rpc": "AskImage", "ms": 1.5})
    assert found["exception"].startswith("Traceback")
    assert (found["rpc"], found["ms"]) == ("AskImage", 1.5)


def test_a_line_within_a_request_names_its_trace_and_its_tenant():
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    method = "/hiprune.v1.EncoderService/EncodeImage"
    with telemetry.Served(method, [("traceparent", f"00-{trace_id}-{parent}-01")]) as request:
        request.tenant = "acme"
        found = line(logging.INFO, "here")
    assert (found["trace_id"], found["span_id"], found["tenant"]) == (trace_id, parent, "acme")
    assert "trace_id" not in line(logging.INFO, "behind it")


def test_many_threads_may_look_at_once(page):
    telemetry.observe("hiprune.batch.items", 1)
    found: list[float] = []

    def look() -> None:
        for _ in range(5):
            found.append(samples(page())["hiprune_batch_items_count",])

    threads = [threading.Thread(target=look) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [1.0] * 20


def test_few_may_look_at_once_and_who_comes_too_many_is_hung_up_on():
    server = ScrapeServer(ScrapeReader(), "127.0.0.1", 0)
    server.start()

    def said() -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as mine:
            try:
                mine.sendall(b"GET /elsewhere HTTP/1.0\r\n\r\n")
                return mine.recv(12)
            except ConnectionError:
                return b""

    def until(wanted: bytes) -> None:
        deadline = time.monotonic() + 10
        while said() != wanted:
            assert time.monotonic() < deadline

    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
    until(b"")
    for each in silent:
        each.close()
    until(b"HTTP/1.0 404")
    server.close()
