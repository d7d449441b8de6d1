"""One request over HTTP as it is seen from outside: a span, a line in the log, an id that its client is told.

No record holds what a client sent or got: the method and the route as declared here, never the path as it
came; statuses, codes and times. Names of spans are OpenTelemetry's for HTTP servers; metrics are those of the
RPC that a request becomes, so that what shows a service's requests shows the gateway's as well.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hiprune import telemetry
from hiprune.telemetry import names

_access = logging.getLogger("hiprune.access")

CLIENT_LEFT: Final = 499
"""Nginx's word for it; nobody reads it but the log."""
_HEADERS: Final = ("traceparent", "tracestate")
_CODES: Final = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CLIENT_LEFT: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""gRPC's word for a status; other refusals are INVALID_ARGUMENT."""
_FULL: Final = "overloaded"
"""A 503 too, as HTTP has it; but nothing is down, and the llm counts its own as RESOURCE_EXHAUSTED."""


class Exchange:
    """`with Exchange("GET", "/v1/models", headers, "GetLanguageModel") as it: it.status = 200`."""

    def __init__(self, method: str, route: str, headers: Mapping[str, str], rpc: str) -> None:
        self._method = method
        self._route = route
        self._rpc = rpc
        self._carrier = {name: headers[name] for name in _HEADERS if name in headers}
        self.id = f"req_{secrets.token_hex(12)}"
        self.status = 0
        """What the client is told first; an error within a stream comes behind a 200."""
        self._outcome = 0
        self._code = ""

    def failed(self, status: int, code: str) -> None:
        """It ends with an error, whatever was told before."""
        self._outcome, self._code = status, code

    def __enter__(self) -> Self:
        self._began_s = time.perf_counter()
        caller = TraceContextTextMapPropagator().extract(self._carrier, Context())
        self._span = trace.get_tracer(names.SCOPE).start_span(
            f"{self._method} {self._route}",
            caller,
            SpanKind.SERVER,
            {"http.request.method": self._method, "http.route": self._route},
        )
        self._before = otel_context.attach(trace.set_span_in_context(self._span, caller))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        spent_s = time.perf_counter() - self._began_s
        failed = bool(self._outcome)
        code = self._grpc_code()
        telemetry.observe("hiprune.rpc.duration", spent_s, rpc=self._rpc, code=code.name)
        if failed:
            reason = self._code.upper()
            reason = reason if reason in names.REASONS else "OTHER"
            telemetry.count("hiprune.errors", rpc=self._rpc, code=code.name, reason=reason)
            self._span.set_attribute("error.type", self._code)
        self._span.set_attribute("http.response.status_code", self.status)
        if self._outcome >= 500:
            self._span.set_status(Status(StatusCode.ERROR, self._code))
        self._tell(spent_s * 1000)
        self._span.end()
        otel_context.detach(self._before)

    def _grpc_code(self) -> grpc.StatusCode:
        if not self._outcome:
            return grpc.StatusCode.OK
        if self._code == _FULL:
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        return _CODES.get(self._outcome, grpc.StatusCode.INVALID_ARGUMENT)

    def _tell(self, spent_ms: float) -> None:
        if not _access.isEnabledFor(logging.INFO):
            return
        fields = {
            "method": self._method,
            "route": self._route,
            "status": self.status,
            "ms": round(spent_ms, 3),
            "request_id": self.id,
        }
        text = f"{self._method} {self._route} {self.status} in {spent_ms:.1f} ms {self.id}"
        if self._code:
            fields["code"] = self._code
            text += f" code={self._code}"
        _access.info("%s", text, extra={"fields": fields})
