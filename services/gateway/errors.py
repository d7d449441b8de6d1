"""Errors as clients of OpenAI's API read them: a status, and `{"error": {message, type, param, code}}`.

Knows the domain errors of `hiprune.errors`, which the services answer with, and HTTP; knows no route. What
only HTTP has, a body that is too long or a path that is not there, is an `HttpError` of its own.

    InvalidInput, Unsupported   400    the request is wrong; `param` names the field as the client sent it
    Unauthenticated             401
    PermissionDenied            403
    NotFound                    404    a model that is not served
    Exhausted (QUOTA)           429    says when to come back
    Exhausted (others)          503    a queue is full; says when to come back
    Unavailable                 503    starting, draining, or a service that cannot be reached
    Expired                     504    the deadline passed
    Mismatch, Internal          500    the log has the cause, the client does not
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from hiprune.errors import (
    Exhausted,
    Expired,
    HipruneError,
    InvalidInput,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

_KINDS: Final[Mapping[type[HipruneError], tuple[int, str]]] = {
    InvalidInput: (400, "invalid_request_error"),
    Unsupported: (400, "invalid_request_error"),
    Unauthenticated: (401, "authentication_error"),
    PermissionDenied: (403, "permission_error"),
    NotFound: (404, "not_found_error"),
    Exhausted: (503, "server_error"),
    Unavailable: (503, "server_error"),
    Expired: (504, "timeout_error"),
}
_CODES: Final = {"UNAUTHENTICATED": "invalid_api_key", "UNKNOWN_MODEL": "model_not_found"}
"""Where OpenAI has a word of its own for one of our reasons."""
_RETRY: Final = "x-should-retry"
"""OpenAI's clients try again after any 5xx, unless this header says that it is of no use."""
_LEAST_RETRY_S: Final = 1.0


class HttpError(Exception):
    """What a client is answered in place of an answer. `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """The body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def body(self) -> bytes:
        """The body as JSON."""
        return json.dumps(self.content(), ensure_ascii=False, separators=(",", ":")).encode()


def from_hiprune(error: HipruneError, named: Callable[[str], str] = lambda field: field) -> HttpError:
    """A domain error over HTTP. `named` gives a field of the gRPC request the name that the client knows."""
    status, kind = _KINDS.get(type(error), (500, "server_error"))
    if isinstance(error, Exhausted) and error.reason == "QUOTA":
        status, kind = 429, "rate_limit_error"
    elif isinstance(error, Exhausted) and error.reason == "LIMIT_EXCEEDED":
        status, kind = 413, "invalid_request_error"  # gRPC's own bound on a message
    param = named(error.field) if error.field else None
    headers = {}
    wait_s = error.retry_after_s
    if wait_s is None and status in (429, 503):
        wait_s = _LEAST_RETRY_S
    if wait_s is not None:
        headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(1000 * wait_s))}
    if status in (500, 504):
        headers[_RETRY] = "false"
    return HttpError(
        status,
        f"{param}: {error.message}" if param else error.message,
        kind=kind,
        code=_CODES.get(error.reason, error.reason.lower()),
        param=param,
        headers=headers,
    )


def unforeseen() -> HttpError:
    """What a client is told of an error that nobody thought of."""
    return HttpError(
        500,
        "internal error; the gateway's log has the cause",
        kind="server_error",
        code="internal",
        headers={_RETRY: "false"},
    )
