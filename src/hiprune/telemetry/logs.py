"""Logs on standard error, where whatever runs the process collects them: text for people, or JSON.

A JSON line is one object: `time`, `level`, `service`, `logger`, `message`; `trace_id` and `span_id` where
something is traced; `tenant` within a request; and what the call gave as `extra={"fields": …}`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from opentelemetry import trace

from hiprune import telemetry
from hiprune.config import ProcessSettings

_CHATTY: Final = ("httpx", "httpx2", "huggingface_hub")


def set_up(settings: ProcessSettings) -> None:
    """Logs of this process go to standard error, from the settings' level on and in their format."""
    handler = logging.StreamHandler()
    if settings.log_format == "json":
        handler.setFormatter(JsonLines(settings.service))
        logging.captureWarnings(True)  # which would be lines of text among the objects
    else:
        style = f"%(asctime)s %(levelname)s {settings.service} %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(style))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line. What JSON has no form for becomes text."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (context := trace.get_current_span().get_span_context()).is_valid:
            line |= {
                "trace_id": trace.format_trace_id(context.trace_id),
                "span_id": trace.format_span_id(context.span_id),
            }
        if (request := telemetry.current()) is not None and request.tenant:
            line["tenant"] = request.tenant
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line |= fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str)
