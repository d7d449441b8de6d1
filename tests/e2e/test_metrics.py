"""Claims about what Prometheus finds, what a collector is sent and what the logs say, of real processes."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request

import pytest

from hiprune.client import Client
from hiprune.errors import InvalidInput
from hiprune.stack import SERVICES
from hiprune.telemetry import names
from hiprune.v1 import pruner_service_pb2
from tests.stacks import picture

pytestmark = pytest.mark.extra

QUESTION = "which shape is blue ?"
PLUS_PLUS = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS)


@pytest.fixture(scope="module")
async def asked(observed):
    """What the stack has done: a miss, an encoded hit, a pruned hit, and an error. And the last answer."""
    async with Client(observed.stack.address) as client:
        await client.ask(QUESTION, picture("scene04.png"))
        await client.ask(QUESTION, picture("scene04.png"), policy=PLUS_PLUS)
        answer = await client.ask(QUESTION, picture("scene04.png"))
        with pytest.raises(InvalidInput):
            await client.ask(QUESTION, b"no picture")
    await asyncio.sleep(0.5)  # what is put into the cache is counted when it is there
    return answer


def samples(observed, service: str) -> list[tuple[str, dict[str, str], float]]:
    return [
        (sample.name, sample.labels, sample.value)
        for family in observed.families(service).values()
        for sample in family.samples
    ]


def value(observed, service: str, series: str, **labels: str) -> float:
    """The sum of a series over the samples with these labels."""
    found = [
        amount
        for name, own, amount in samples(observed, service)
        if name == series and labels.items() <= own.items()
    ]
    assert found, f"the {service} exports no {series} with {labels}"
    return sum(found)


async def test_what_is_exported_is_what_is_declared_by_name_and_by_label(observed, asked):
    declared = names.prometheus_series()
    exported = set()
    for service in SERVICES:
        for name, labels, _ in samples(observed, service):
            if name.startswith("hiprune_"):
                assert declared[name] == frozenset(labels), name
                exported.add(name)
            else:
                assert re.match(r"process_|target_info$", name), name
    # what only trouble or another engine brings about
    rare = {
        "hiprune_requests_rejected_total",
        "hiprune_limits_fallbacks_total",
        "hiprune_cache_failures_total",
        "hiprune_cache_joins_total",
        "hiprune_engine_blocks_held_ratio",
    }
    assert declared.keys() - exported <= rare


async def test_the_collector_is_sent_the_same_metrics(observed, asked):
    def sent() -> set[str]:
        return {
            metric.name
            for request in list(observed.collector.metrics)
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    scraped = {
        name
        for kind, instruments in names.METRICS.items()
        for name, instrument in instruments.items()
        if any(
            exported == (base := names.prometheus_name(name, kind, instrument.unit))
            or exported.startswith((f"{base}_total", f"{base}_bucket"))
            for service in SERVICES
            for exported, _, _ in samples(observed, service)
        )
    }
    assert len(scraped) > 20
    await asyncio.to_thread(observed.collector.wait, lambda: sent() >= scraped)
    assert scraped <= sent() <= {name for each in names.METRICS.values() for name in each}


async def test_each_service_tells_who_it_is(observed, asked):
    for service in SERVICES:
        (labels,) = (own for name, own, _ in samples(observed, service) if name == "target_info")
        assert labels["service_name"] == f"hiprune-{service}"
        assert labels["service_instance_id"]


async def test_tokens_hits_and_answers_are_counted(observed, asked):
    before = value(observed, "llm", "hiprune_tokens_before_total", tenant="anonymous")
    kept = value(observed, "llm", "hiprune_tokens_kept_total", tenant="anonymous")
    assert 0 < kept < before
    usage = asked.completion.usage
    assert before >= 3 * usage.visual_tokens_before
    assert value(observed, "llm", "hiprune_tokens_generated_total") >= usage.completion_tokens
    assert value(observed, "llm", "hiprune_prefill_flops_after_total") < value(
        observed, "llm", "hiprune_prefill_flops_before_total"
    )
    lookups = "hiprune_cache_lookups_total"
    assert value(observed, "pruner", lookups, level="pruned", outcome="hit") >= 1
    assert value(observed, "pruner", lookups, level="encoded", outcome="hit") >= 1
    assert value(observed, "pruner", lookups, level="encoded", outcome="miss") >= 1
    for method in ("hiprune", "hiprune_plus_plus"):
        assert value(observed, "pruner", "hiprune_retention_count", method=method) >= 1
    share = value(observed, "pruner", "hiprune_retention_sum", method="hiprune_plus_plus") / value(
        observed, "pruner", "hiprune_retention_count", method="hiprune_plus_plus"
    )
    assert 0.2 < share < 0.5


async def test_times_batches_and_queues_are_told(observed, asked):
    first = "hiprune_time_to_first_token_seconds"
    answers = value(observed, "llm", f"{first}_count", rpc="AskImage")
    assert answers == value(observed, "llm", "hiprune_rpc_duration_seconds_count", rpc="AskImage", code="OK")
    # the first token comes before the answer ends
    total = value(observed, "llm", "hiprune_rpc_duration_seconds_sum", rpc="AskImage", code="OK")
    assert 0 < value(observed, "llm", f"{first}_sum", rpc="AskImage") <= total
    batches = value(observed, "encoder", "hiprune_batch_items_count")
    assert value(observed, "encoder", "hiprune_batch_items_sum") >= batches >= 1
    assert value(observed, "encoder", "hiprune_batch_patches_sum") > batches
    for service, stages in {
        "llm": ("queue", "prune", "project", "prefill", "decode"),
        "pruner": ("cache_get", "cache_put", "encode", "text", "select"),
        "encoder": ("preprocess", "queue", "vision", "capture"),
    }.items():
        for stage in stages:
            assert value(observed, service, "hiprune_stage_duration_seconds_count", stage=stage) >= 1
    for service, queues in {
        "llm": ("parse", "slots"),
        "pruner": ("parse", "text", "prune", "compare"),
        "encoder": ("parse", "decode", "vision"),
    }.items():
        for queue in queues:
            assert value(observed, service, "hiprune_queue_depth", queue=queue) == 0
            assert value(observed, service, "hiprune_queue_limit", queue=queue) > 0
        assert value(observed, service, "hiprune_running_limit", pool="requests") == 1024


async def test_errors_are_counted_by_code_and_reason(observed, asked):
    for service, rpc in (("llm", "AskImage"), ("pruner", "PruneImage"), ("encoder", "EncodeImage")):
        labels = {"rpc": rpc, "code": "INVALID_ARGUMENT"}
        errors = value(observed, service, "hiprune_errors_total", **labels, reason="IMAGE_UNREADABLE")
        assert errors >= 1
        assert value(observed, service, "hiprune_rpc_duration_seconds_count", **labels) >= errors


async def test_a_bucket_names_a_trace_that_fell_into_it(observed, asked):
    found = [
        (family.name, sample)
        for service in SERVICES
        for family in observed.families(service).values()
        for sample in family.samples
        if sample.exemplar is not None
    ]
    named = {name for name, _ in found}
    assert {"hiprune_rpc_duration_seconds", "hiprune_stage_duration_seconds"} <= named

    def known() -> set[str]:
        return {span.trace for span in list(observed.collector.spans)}

    for _, sample in found:
        assert sample.exemplar.value <= float(sample.labels["le"])
        trace = sample.exemplar.labels["trace_id"]
        assert await asyncio.to_thread(observed.collector.wait, lambda trace=trace: trace in known())


async def test_the_page_is_text_for_who_does_not_ask_for_more_and_the_only_one(observed, asked):
    page = observed.scrape("pruner", accept="*/*")
    assert "# TYPE hiprune_cache_lookups_total counter" in page
    assert "trace_id" not in page  # exemplars are OpenMetrics' own
    with pytest.raises(urllib.error.HTTPError, match="404"):
        observed.scrape("pruner", path="/other")


async def test_every_line_of_a_log_is_json_and_every_request_ends_with_one_that_names_its_trace(
    observed, asked
):
    await asyncio.to_thread(observed.collector.wait, lambda: bool(observed.collector.spans))
    for service, rpc in (("llm", "AskImage"), ("pruner", "PruneImage"), ("encoder", "EncodeImage")):
        lines = [json.loads(line) for line in observed.stack.log_of(service).splitlines()]
        assert all(line["service"] == service for line in lines)
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
        ends = [line for line in lines if line["logger"] == "hiprune.access" and line["rpc"] == rpc]
        assert {"OK", "INVALID_ARGUMENT"} <= {line["code"] for line in ends}
        for line in ends:
            assert line["ms"] > 0
            assert line["tenant"] == "anonymous"
            assert re.fullmatch("[0-9a-f]{32}", line["trace_id"])
            assert re.fullmatch("[0-9a-f]{16}", line["span_id"])
