"""Every name that this project reports by: stages, spans and their edges, counters, histograms, gauges.

Declared here once. `docs/telemetry.md` is made from it, what is recorded is held against it, and so are the
queries in `deploy/`. Every label has few values: those listed, or the names in the tenants file. Knows
nothing of what reports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import grpc

SCOPE: Final = "hiprune"
"""OpenTelemetry's name for what records: spans and metrics of ours alone have it."""

# --- spans -------------------------------------------------------------------------------------------------

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

SPANS: Final = {
    "queue": "waiting: for the llm's slot, or in the encoder for the tower",
    "preprocess": "an image or video decoded and resized, the wait for a thread included",
    "vision": "the batch in which the tower ran for this request; attribute `hiprune.batch.items`",
    "capture": "one layer's scores, within vision; attribute `hiprune.layer`. On a GPU the time to "
    "launch it, and none where the forward is a CUDA graph",
    "encode": "getting an encoded image that the cache did not have; linked to the request that it joined",
    "text": "the question, as its paired text encoder reads it",
    "select": "which tokens stay",
    "cache_get": "a look-up; attributes `hiprune.cache.level` and `hiprune.cache.outcome`",
    "cache_put": "an entry on its way to the store, behind the answer; attribute `hiprune.cache.level`",
    "prune": "one image or video, as the llm waits for it",
    "project": "kept tokens through the projector, and into the prompt",
    "prefill": "up to the first token of the answer",
    "decode": "from the first token to the last",
}
"""Every span within a service, and what it spans: the stages, and what is only in traces."""

RPCS: Final = {
    "AskImage": "hiprune.v1.ImageQaService",
    "GenerateText": "hiprune.v1.LanguageModelService",
    "GetLanguageModel": "hiprune.v1.LanguageModelService",
    "PruneImage": "hiprune.v1.PrunerService",
    "PruneTokens": "hiprune.v1.PrunerService",
    "GetPruner": "hiprune.v1.PrunerService",
    "EncodeImage": "hiprune.v1.EncoderService",
    "GetEncoder": "hiprune.v1.EncoderService",
}
"""Every RPC of ours and its service. Each is a span `SERVICE/RPC` where it is served, and one where a service
or the Python client calls it."""

EDGES: Final = (
    ("AskImage (call)", "AskImage"),
    ("AskImage", "queue"),
    ("AskImage", "prune"),
    ("prune", "PruneImage (call)"),
    ("PruneImage (call)", "PruneImage"),
    ("PruneImage", "cache_get"),
    ("PruneImage", "text"),
    ("PruneImage", "encode"),
    ("encode", "EncodeImage (call)"),
    ("EncodeImage (call)", "EncodeImage"),
    ("EncodeImage", "preprocess"),
    ("EncodeImage", "queue"),
    ("EncodeImage", "vision"),
    ("vision", "capture"),
    ("encode", "cache_get"),
    ("encode", "cache_put"),
    ("PruneImage", "select"),
    ("PruneImage", "cache_put"),
    ("AskImage", "project"),
    ("AskImage", "prefill"),
    ("AskImage", "decode"),
    ("GenerateText", "queue"),
    ("GenerateText", "project"),
    ("GenerateText", "prefill"),
    ("GenerateText", "decode"),
    ("PruneTokens", "text"),
    ("PruneTokens", "select"),
)
"""Which span may be whose child, parent first. `RPC (call)` is the caller's span, `RPC` the server's, which
begins a trace where its caller brings none."""

# --- metrics -----------------------------------------------------------------------------------------------

TENANTS: Final[tuple[str, ...]] = ()
"""Values of a label that nobody can make up: names in the tenants file, and `anonymous`."""

CODES: Final = tuple(code.name for code in grpc.StatusCode)
REASONS: Final = (
    "INVALID_FIELD",
    "LIMIT_EXCEEDED",
    "IMAGE_UNREADABLE",
    "MISSING_FIELD",
    "RESERVED_TOKEN",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "UNTRUSTED_PEER",
    "UNKNOWN_MODEL",
    "MODEL_MISMATCH",
    "NO_TEXT_MODEL",
    "OVERLOADED",
    "QUOTA",
    "UNSUPPORTED",
    "UNAVAILABLE",
    "NOT_READY",
    "ENCODER_UNREACHABLE",
    "ENCODER_STOPPED",
    "PRUNER_UNREACHABLE",
    "PRUNER_STOPPED",
    "DEADLINE_EXCEEDED",
    "CLIENT_LEFT",
    "INTERNAL",
    "OTHER",
)
"""`ErrorInfo.reason` of every error of ours; CLIENT_LEFT where nobody waits for one, OTHER for any else."""
LEVELS: Final = ("encoded", "pruned")
METHODS: Final = ("none", "hiprune", "hiprune_plus_plus", "random", "strided", "visionzip", "divprune")
QUEUES: Final = ("parse", "decode", "vision", "text", "prune", "compare", "slots")
POOLS: Final = ("requests", "slots")

_SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0),
)
_RATIOS: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ITEMS: Final = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
_PATCHES: Final = (256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0)

Kind = Literal["counter", "histogram", "gauge"]


@dataclass(frozen=True, slots=True)
class Instrument:
    """A metric. `labels` gives the values that each label may have; none: see TENANTS."""

    unit: str
    """UCUM, as OpenTelemetry has it: `s`, `By`, `1` for a share, `{token}` for what is counted."""
    meaning: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds, in its unit."""


COUNTERS: Final = {
    "hiprune.requests": Instrument(
        "{request}", "requests admitted at the first service they reached", {"tenant": TENANTS}
    ),
    "hiprune.requests.rejected": Instrument(
        "{request}",
        "requests refused because a limit of their tenant's was reached",
        {"tenant": TENANTS, "limit": ("requests_per_minute", "tokens_per_minute", "concurrency")},
    ),
    "hiprune.errors": Instrument(
        "{request}",
        "requests that did not end well, by status code and the error's reason",
        {"rpc": tuple(RPCS), "code": CODES, "reason": REASONS},
    ),
    "hiprune.tokens.before": Instrument(
        "{token}", "visual tokens before pruning, at the first service of a request", {"tenant": TENANTS}
    ),
    "hiprune.tokens.kept": Instrument("{token}", "visual tokens kept of them", {"tenant": TENANTS}),
    "hiprune.tokens.prompt": Instrument("{token}", "tokens that the language model was given to read"),
    "hiprune.tokens.generated": Instrument("{token}", "tokens that it answered with"),
    "hiprune.prefill.flops.before": Instrument(
        "{operation}", "estimated floating-point operations of all prefills, had nothing been pruned"
    ),
    "hiprune.prefill.flops.after": Instrument(
        "{operation}", "estimated floating-point operations of them as is"
    ),
    "hiprune.limits.fallbacks": Instrument(
        "{operation}", "operations on limits that this process decided alone, its Redis being slow or down"
    ),
    "hiprune.cache.lookups": Instrument(
        "{lookup}",
        "look-ups in the cache of images",
        {"level": LEVELS, "outcome": ("hit", "miss", "damaged", "other_dtype")},
    ),
    "hiprune.cache.stored": Instrument("By", "bytes stored in the cache of images", {"level": LEVELS}),
    "hiprune.cache.failures": Instrument(
        "{operation}",
        "operations that a Redis was too slow, too full or not there for",
        {"operation": ("get", "put")},
    ),
    "hiprune.cache.joins": Instrument(
        "{request}",
        "requests that shared another's encoding of the same image",
        {"scope": ("process", "replicas")},
    ),
}
"""Every counter."""

HISTOGRAMS: Final = {
    "hiprune.rpc.duration": Instrument(
        "s",
        "time from a request's arrival until its answer was sent",
        {"rpc": tuple(RPCS), "code": CODES},
        _SECONDS,
    ),
    "hiprune.stage.duration": Instrument(
        "s", "time of each stage of each request", {"stage": tuple(SPANS)}, _SECONDS
    ),
    "hiprune.time_to_first_token": Instrument(
        "s",
        "time from a request's arrival at the llm until the first token of its answer",
        {"rpc": ("AskImage", "GenerateText")},
        _SECONDS,
    ),
    "hiprune.batch.items": Instrument("{item}", "requests in a batch of the tower", buckets=_ITEMS),
    "hiprune.batch.patches": Instrument("{patch}", "patches in a batch of the tower", buckets=_PATCHES),
    "hiprune.retention": Instrument(
        "1", "share of an image's or video's visual tokens that was kept", {"method": METHODS}, _RATIOS
    ),
}
"""Every histogram. Where a request is traced, its buckets carry exemplars: the trace to look at."""

GAUGES: Final = {
    "hiprune.queue.depth": Instrument(
        "{item}",
        "what waits: vision in patches, decode and slots in requests, all others in their cost",
        {"queue": QUEUES},
    ),
    "hiprune.queue.limit": Instrument(
        "{item}", "how much may wait there before requests are refused as OVERLOADED", {"queue": QUEUES}
    ),
    "hiprune.running": Instrument(
        "{request}", "requests in the service, and those that hold a slot", {"pool": POOLS}
    ),
    "hiprune.running.limit": Instrument("{request}", "how many may be there at a time", {"pool": POOLS}),
    "hiprune.intake.held": Instrument("By", "requests being served and answers being sent, as bytes"),
    "hiprune.engine.blocks_held": Instrument(
        "1", "share of vLLM's blocks of keys and values that answers hold"
    ),
    "hiprune.cache.breaker": Instrument("{breaker}", "1 while a Redis that failed is left alone, else 0"),
}
"""Every gauge."""

METRICS: Final[Mapping[Kind, Mapping[str, Instrument]]] = {
    "counter": COUNTERS,
    "histogram": HISTOGRAMS,
    "gauge": GAUGES,
}


def check(name: str, kind: Kind, labels: Mapping[str, str]) -> Instrument:
    """The declaration of what is about to be recorded. Raises ValueError for what is not declared."""
    instrument = METRICS[kind].get(name)
    if instrument is None:
        raise ValueError(f"{kind} {name!r} is not declared in hiprune.telemetry.names")
    if labels.keys() != instrument.labels.keys():
        raise ValueError(f"{name}: labels {sorted(labels)}, expected {sorted(instrument.labels)}")
    for label, value in labels.items():
        allowed = instrument.labels[label]
        if allowed and value not in allowed:
            raise ValueError(f"{name}: {label} is {value!r}, expected one of {', '.join(allowed)}")
    return instrument


# --- what Prometheus calls them ----------------------------------------------------------------------------

_UNITS: Final = {"s": "seconds", "By": "bytes"}


def prometheus_name(name: str, kind: Kind, unit: str) -> str:
    """A metric's name in Prometheus, of a histogram and a counter without what comes behind it.

    By OpenTelemetry's rules: underscores for dots, the unit behind, `ratio` behind a gauge of unit 1. Source:
    opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics.
    """
    suffix = _UNITS.get(unit, "ratio" if unit == "1" and kind == "gauge" else "")
    return name.replace(".", "_") + (f"_{suffix}" if suffix else "")


def prometheus_series() -> dict[str, frozenset[str]]:
    """Every series that a service may export, by its name in Prometheus, and its labels, `le` included."""
    found: dict[str, frozenset[str]] = {}
    for kind, instruments in METRICS.items():
        for name, instrument in instruments.items():
            base, labels = prometheus_name(name, kind, instrument.unit), frozenset(instrument.labels)
            if kind == "counter":
                found[f"{base}_total"] = labels
            elif kind == "gauge":
                found[base] = labels
            else:
                found |= {f"{base}_sum": labels, f"{base}_count": labels, f"{base}_bucket": labels | {"le"}}
    return found
