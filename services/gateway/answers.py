"""The llm's events as OpenAI's API has an answer: one object, or chunks of one.

Beside what that API knows: `usage.prompt_tokens_details` has the visual tokens before and after pruning, and
`pruning` the report (`reports.py`). Clients that know neither pass over them. Pure; knows no HTTP but the
names of headers.

Source: OpenAI's API reference, "The chat completion object" and "The chat completion chunk object".
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any, Final

from hiprune.policies import CACHE_WORDS
from hiprune.results import milliseconds
from hiprune.v1 import llm_service_pb2
from services.gateway.chat import ChatRequest
from services.gateway.reports import pruning_of

_FINISH: Final = {
    llm_service_pb2.FINISH_REASON_STOP: "stop",
    llm_service_pb2.FINISH_REASON_LENGTH: "length",
}


_REPORT_WORK: Final = 64
"""What a byte of a detailed report takes to tell, in bytes of JSON read: of 100 000 scores, 0.3 s."""
# gives other threads their turn between two of its pieces, as json.dumps does not
_YIELDING: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Reply:
    """One answer in the making."""

    def __init__(self, chat: ChatRequest) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = chat.model
        self._detailed = chat.wants_report
        self._scored = chat.wants_scores
        self._usage_in_stream = chat.includes_usage

    def work(self, report: llm_service_pb2.PruningReport) -> int:
        """What telling the report takes, in bytes of JSON read."""
        return _REPORT_WORK * report.ByteSize() if self._detailed else 0

    def whole(
        self, text: str, report: llm_service_pb2.PruningReport, completion: llm_service_pb2.Completion
    ) -> bytes:
        """The answer as one object."""
        content: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": _FINISH.get(completion.finish_reason, "stop"),
                }
            ],
            "usage": usage_of(completion.usage),
            "pruning": self._pruning(report),
        }
        if self._detailed:
            content["pruning"]["timings_ms"] = milliseconds(completion.timings)
        return _json(content, yielding=self._scored)

    def opening(self, report: llm_service_pb2.PruningReport) -> bytes:
        """The first chunk: who speaks, and what was pruned."""
        return self._chunk({"role": "assistant", "content": ""}, pruning=self._pruning(report))

    def delta(self, text: str) -> bytes:
        """A chunk of text."""
        return self._chunk({"content": text})

    def closing(self, completion: llm_service_pb2.Completion) -> Iterable[bytes]:
        """The last chunks: why it ended and, if asked for, what it took."""
        reason = _FINISH.get(completion.finish_reason, "stop")
        more = {"pruning": {"timings_ms": milliseconds(completion.timings)}} if self._detailed else {}
        yield self._chunk({}, finish_reason=reason, **more)
        if self._usage_in_stream:
            yield self._event({"choices": [], "usage": usage_of(completion.usage)})
        yield b"data: [DONE]\n\n"

    def _pruning(self, report: llm_service_pb2.PruningReport) -> dict[str, Any]:
        return pruning_of(report, detailed=self._detailed, scored=self._scored)

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        if self._usage_in_stream:
            more["usage"] = None
        return self._event({"choices": [choice], **more}, yielding=self._scored and "pruning" in more)

    def _event(self, content: dict[str, Any], *, yielding: bool = False) -> bytes:
        return event(
            {
                "id": self._id,
                "object": "chat.completion.chunk",
                "created": self._created,
                "model": self._model,
                **content,
            },
            yielding=yielding,
        )


def event(content: dict[str, Any], *, yielding: bool = False) -> bytes:
    """A server-sent event. `yielding`: made so that other threads get their turn meanwhile."""
    return b"data: " + _json(content, yielding=yielding) + b"\n\n"


def usage_of(usage: llm_service_pb2.Usage) -> dict[str, Any]:
    """What an answer took; beside it, before and after pruning, visual tokens and an estimate of the work."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.prompt_tokens_cached,
            "visual_tokens_before": usage.visual_tokens_before,
            "visual_tokens_after": usage.visual_tokens_after,
            "prefill_flops_before": round(usage.prefill_flops_before),
            "prefill_flops_after": round(usage.prefill_flops_after),
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def headers_of(report: llm_service_pb2.PruningReport) -> dict[str, str]:
    """The sums of a report, for who looks at headers alone."""
    return {
        "x-hiprune-tokens-before": str(sum(media.summary.tokens_before for media in report.media)),
        "x-hiprune-tokens-kept": str(sum(media.summary.tokens_kept for media in report.media)),
        "x-hiprune-cache": ", ".join(CACHE_WORDS.get(media.cache, "") for media in report.media),
    }


def _json(content: dict[str, Any], *, yielding: bool = False) -> bytes:
    if yielding:
        return "".join(_YIELDING.iterencode(content)).encode()
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
