"""Domain errors, and how each one looks on the wire.

Code anywhere raises these; one interceptor (`hiprune.server`) turns them into a status with
`google.rpc` details, and one function (`from_rpc`) turns a peer's status back into them, so that an
error keeps its reason and its field across every hop. Knows gRPC's status codes; knows no service.

    HipruneError
    ├── InvalidInput         INVALID_ARGUMENT     a field is wrong: names it, its value and the bound
    ├── Unauthenticated      UNAUTHENTICATED      no key, or an unknown one
    ├── PermissionDenied     PERMISSION_DENIED    a known caller asks for what it may not have
    ├── NotFound             NOT_FOUND            a model that is not served here
    ├── Mismatch             FAILED_PRECONDITION  two services, or a caller, hold different models
    ├── Exhausted            RESOURCE_EXHAUSTED   a queue is full or a quota is spent; says when to retry
    ├── Unsupported          UNIMPLEMENTED        legal, but not by this model family or engine
    ├── Unavailable          UNAVAILABLE          a peer cannot be reached; safe to retry
    ├── Expired              DEADLINE_EXCEEDED    the caller's deadline passed
    └── Internal             INTERNAL             unforeseen; the log has the cause, the client does not
"""

from __future__ import annotations

from typing import ClassVar, Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

NO_RETRY: Final = ("grpc-retry-pushback-ms", "-1")
"""Trailing metadata by which a server tells a client's gRPC not to try again (gRFC A6)."""

DOMAIN: Final = "hiprune"
"""`ErrorInfo.domain` of every error that our own code raises."""

_MAX_MESSAGE_BYTES: Final = 1000
"""gRPC replaces a status whose trailers exceed 8 KiB; they hold the message three times, once %-encoded."""


class HipruneError(Exception):
    """Base of all domain errors.

    `reason` is the machine-readable `ErrorInfo.reason` (UPPER_SNAKE_CASE, stable across releases);
    `field` is the path of the offending field in the request as the client sent it, or empty.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.retried = False
        """A peer's answer, after all the attempts that make sense: the next hop is to make no more."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def under(self, prefix: str) -> HipruneError:
        """The same error with its field path below `prefix`; itself when it names no field."""
        if not self.field:
            return self
        moved = type(self)(
            self.message,
            reason=self.reason,
            field=f"{prefix}.{self.field}",
            retry_after_s=self.retry_after_s,
        )
        moved.__cause__ = self
        return moved


class InvalidInput(HipruneError):
    """A field of the request is wrong. The message gives the value and the bound.

    Reasons: INVALID_FIELD (default), LIMIT_EXCEEDED, IMAGE_UNREADABLE, MISSING_FIELD, RESERVED_TOKEN.
    """

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_FIELD"


class Unauthenticated(HipruneError):
    """The caller is not known."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(HipruneError):
    """The caller is known and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class NotFound(HipruneError):
    """The request names a model that this service does not serve."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "UNKNOWN_MODEL"


class Mismatch(HipruneError):
    """Features and model, or two services, do not belong together."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "MODEL_MISMATCH"


class Exhausted(HipruneError):
    """No room now. Reasons: OVERLOADED (default; another replica may have room) and QUOTA."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "OVERLOADED"


class Unsupported(HipruneError):
    """A legal request that this model family, engine or build does not implement."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNSUPPORTED"


class Unavailable(HipruneError):
    """A peer cannot be reached, or this service is not ready. Retrying is safe."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class Expired(HipruneError):
    """The deadline passed before the answer was ready."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Internal(HipruneError):
    """An unforeseen failure. Its message is for clients and says nothing of the cause."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


_BY_CODE: Final[dict[grpc.StatusCode, type[HipruneError]]] = {
    kind.code: kind
    for kind in (
        InvalidInput,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        Mismatch,
        Exhausted,
        Unsupported,
        Unavailable,
        Expired,
        Internal,
    )
}


def to_status(error: HipruneError) -> status_pb2.Status:
    """`google.rpc.Status` with `ErrorInfo`, and `BadRequest` and `RetryInfo` where they apply.

    A very long message is cut.
    """
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    packed = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=_cut(error.message), reason=error.reason
        )
        packed.append(error_details_pb2.BadRequest(field_violations=[violation]))
        details[0].metadata["field"] = error.field
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        packed.append(error_details_pb2.RetryInfo(retry_delay=delay))
    number: int = error.code.value[0]
    status = status_pb2.Status(code=number, message=_cut(str(error)))
    for detail in (*details, *packed):
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)
        status.details.append(wrapped)
    return status


def from_rpc(error: grpc.aio.AioRpcError, *, peer: str) -> HipruneError:
    """The domain error behind a peer's status; Internal for a code that none of ours has.

    `peer` names the service that was called ("encoder"), for errors that the peer did not write itself.
    """
    # nobody here cancels and then reads the status: a server that leaves cancels what it will not finish
    stopped = error.code() is grpc.StatusCode.CANCELLED
    kind = Unavailable if stopped else _BY_CODE.get(error.code(), Internal)
    text = error.details() or error.code().name
    reason: str | None = None
    field = ""
    retry_after_s: float | None = None
    for detail in _details_of(error):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason = detail.reason
            field = detail.metadata.get("field", "")
        else:
            retry_after_s = detail.retry_delay.ToMilliseconds() / 1000
    if reason is None and kind is Unavailable:
        # where it was looked for is not the client's to know
        text = f"the {peer} stopped before it answered" if stopped else f"the {peer} cannot be reached"
        reason = f"{peer.upper()}_{'STOPPED' if stopped else 'UNREACHABLE'}"
    elif reason is None and kind is Exhausted:
        reason = "LIMIT_EXCEEDED"  # gRPC's own, for a message above a limit: no replica has more room
    elif field:
        text = text.removeprefix(f"{field}: ")
    found = kind(text, reason=reason, field=field, retry_after_s=retry_after_s)
    found.__cause__ = error
    return found


def _cut(text: str) -> str:
    """The text, cut where it is too long for a status."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= _MAX_MESSAGE_BYTES:
        return raw.decode()
    return raw[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "…"


def _details_of(
    error: grpc.aio.AioRpcError,
) -> list[error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo]:
    """The details that we read in an error's trailing metadata; none when absent or unreadable."""
    found = []
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            raw = value if isinstance(value, bytes) else value.encode("latin-1")
            try:
                for detail in status_pb2.Status.FromString(raw).details:
                    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
                        if detail.Is(kind.DESCRIPTOR):
                            found.append(kind.FromString(detail.value))
            except Exception:  # a stranger's trailer is not ours to fail on
                return []
    return found
