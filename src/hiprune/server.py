"""A gRPC service process: interceptor, TLS, health, reflection, readiness, drain. Knows no method."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from hiprune import auth, deadlines, telemetry
from hiprune.checkpoints import CheckpointError
from hiprune.config import ConfigError, ServiceSettings
from hiprune.door import Door
from hiprune.errors import (
    NO_RETRY,
    Exhausted,
    Expired,
    HipruneError,
    Internal,
    InvalidInput,
    Unavailable,
    to_status,
)
from hiprune.intake import Intake, Parse
from hiprune.telemetry import logs
from hiprune.telemetry.exporters import Exporters
from hiprune.trust import Certificates
from hiprune.visitors import Visitors

log = logging.getLogger("hiprune.server")

LIVENESS: Final = "liveness"
"""Health name that is SERVING from the first moment: the process lives, loaded or not."""

_HEALTH: Final = "grpc.health.v1.Health"


_NOTICE_S: Final = 1.0
"""For how long a service that leaves goes on as before, where somebody watches its health: until they have
heard it and call others. A call that arrives just when a gRPC server stops is cancelled, unread."""
_STREAMS_BESIDE: Final = 64
"""Calls on one connection beside as many as are served at a time: health, and those being refused."""
_LEAST_PING_MS: Final = 5_000
"""Who asks more often whether we are there is sent away: gRPC's own bound is five minutes."""
_PING_MS: Final = 30_000
_PONG_MS: Final = 10_000
"""When a client of whom nothing is heard is asked for a sign, and when it counts as gone."""


class Service(Protocol):
    """What a service gives `run`: servicers, and what it takes to be ready and to leave."""

    names: Sequence[str]
    """Full names of its gRPC services."""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds its servicers."""

    async def start(self) -> None:
        """Loads and warms up; may take minutes. Requests are refused until it returns."""

    async def stop(self) -> None:
        """Frees everything; no request is running any more."""

    def request_bytes(self) -> Mapping[str, int]:
        """The largest request of each method, by its path, in bytes; asked once it is ready."""


@runtime_checkable
class CanFail(Protocol):
    """A service, or a part of one, that may find that it can serve no more."""

    async def failed(self) -> str:
        """Returns when that is so, and says why."""


class ServiceFailed(Exception):
    """The service can serve no more; a supervisor is to start it again."""


S = TypeVar("S", bound=ServiceSettings)
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


def main(settings_class: type[S], make: Callable[[S], Service]) -> None:
    """Entry point of `python -m services.X`. A wrong setting or checkpoint is one line and exit code 2."""
    try:
        settings = settings_class.read(sys.argv[1:], os.environ)
        logs.set_up(settings)
        exporters = Exporters.of(settings)
        try:
            asyncio.run(run(settings, make(settings)))
        finally:
            exporters.close()
    except (ConfigError, CheckpointError) as error:
        print(f"hiprune {settings_class.service}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except ServiceFailed as error:
        print(f"hiprune {settings_class.service}: can serve no more: {error}", file=sys.stderr)
        raise SystemExit(1) from error


async def run(settings: ServiceSettings, service: Service) -> None:
    """Serves until SIGTERM or SIGINT, then drains: NOT_SERVING, running requests finish, it leaves.

    Raises ServiceFailed, after the same, when the service finds that it can serve no more.
    """
    door = Door.of(settings)
    certificates = Certificates.of(settings)
    gate = RequestGate(
        settings.default_deadline_ms / 1000,
        door,
        max_deadline_s=settings.max_deadline_ms / 1000,
        max_requests=settings.max_requests,
    )
    server = grpc.aio.server(
        interceptors=[gate],
        options=[
            ("grpc.max_receive_message_length", settings.max_request_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            # clients must come back now and then to find new pods; a stream in flight gets its whole deadline
            ("grpc.max_connection_age_ms", settings.max_connection_age_ms),
            ("grpc.max_connection_age_grace_ms", max(settings.max_deadline_ms, settings.drain_ms)),
            # of each connection: those beyond wait at the client
            ("grpc.max_concurrent_streams", settings.max_requests + _STREAMS_BESIDE),
            ("grpc.so_reuseport", 0),
            # clients ask whether we are there, and we whether they are: see `hiprune.calls.connect`
            ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", _PING_MS),
            ("grpc.keepalive_timeout_ms", _PONG_MS),
            ("grpc.http2.ping_timeout_ms", _PONG_MS),
        ],
    )
    health = Health()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    service.register(server)
    reflection.enable_server_reflection((*service.names, _HEALTH, reflection.SERVICE_NAME), server)
    await health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
    readiness = ("", *service.names)
    for name in readiness:
        await health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    for name in settings.addresses:
        _bind(server, name, settings, certificates)
    await server.start()
    door.open()
    failure = ""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        starting = asyncio.create_task(service.start())
        await asyncio.wait(
            {starting, waiting := asyncio.create_task(stopping.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        if starting.done():
            starting.result()
            gate.open(service.request_bytes())
            for name in readiness:
                await health.set(name, health_pb2.HealthCheckResponse.SERVING)
            log.info("ready on %s", " and ".join(settings.addresses.values()))
            failure = await _until_told_or_failed(waiting, service)
        log.info("draining" if starting.done() else "told to stop while loading")
        await health.leave(readiness, still_serves=starting.done() and not failure)
    finally:
        health.dismiss_watchers()
        await server.stop(settings.drain_ms / 1000)
        loading = not starting.done()
        starting.cancel()
        await service.stop()
        await door.close()
        log.info("stopped")
        if loading:
            # a load runs in a thread that nothing can interrupt, that the interpreter would wait for, and
            # that has nothing to lose
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0)
    if failure:
        raise ServiceFailed(failure)


async def _until_told_or_failed(told: asyncio.Task[bool], service: Service) -> str:
    """Returns when the process is told to stop; or why the service cannot go on, if that comes first."""
    if not isinstance(service, CanFail):
        await told
        return ""
    failing = asyncio.create_task(service.failed())
    await asyncio.wait({told, failing}, return_when=asyncio.FIRST_COMPLETED)
    if not failing.done():
        failing.cancel()
        return ""
    return failing.result()


def _bind(
    server: grpc.aio.Server, name: str, settings: ServiceSettings, certificates: Certificates | None
) -> None:
    """Listens: with TLS where there is a certificate, and never on a Unix socket, which no wire leaves from.

    `name` is the setting with the address. Raises ConfigError.
    """
    at = settings.addresses[name]
    flag = f"{name} (--{name.replace('_', '-')})"
    try:
        _refuse_taken_socket(at)
        if certificates is None or not settings.tls_cert or auth.is_unix(at):
            server.add_insecure_port(at)
        else:
            credentials = certificates.server_credentials(require_clients=settings.tls_client_auth)
            server.add_secure_port(at, credentials)
    except RuntimeError as error:
        raise ConfigError(f"{flag}: got {at!r}, which cannot be bound") from error
    _say_who_may_call(settings, at, flag)


def _say_who_may_call(settings: ServiceSettings, at: str, flag: str) -> None:
    """A line in the log, and a warning for what may surprise. Raises ConfigError for what cannot be meant."""
    if settings.allow_anonymous:
        log.warning("allow_anonymous: anybody who reaches %s may use this service", at)
    elif settings.tenants or settings.peers_only or settings.tls_client_auth:
        kinds = {
            "tenants with a key": settings.tenants,
            "services with peer_token": settings.peer_token.get_secret_value(),
            "holders of a certificate of tls_ca's": settings.tls_client_auth,
            "whoever may open the socket, in the name of any tenant": auth.is_unix(at),
        }
        log.info("on %s are served: %s", at, "; ".join(kind for kind, given in kinds.items() if given))
    else:
        log.info("no tenants are configured: everybody on this machine who reaches %s is served", at)
    if auth.is_unix(at) and (mode := os.stat(at.removeprefix("unix:")).st_mode) & stat.S_IWOTH:
        if settings.tenants:
            raise ConfigError(
                f"{flag}: got {at!r}, which everybody on this machine may open (mode "
                f"{stat.S_IMODE(mode):04o}) and so could speak for any tenant: start with a umask of 0002 or "
                "stricter"
            )
        log.warning("everybody on this machine may open %s, and so counts as a service", at)
    takes_secrets = settings.tenants or settings.peer_token.get_secret_value()
    if takes_secrets and not settings.tls_cert and not auth.is_private(at):
        log.warning(
            "keys and peer_token come to %s in plain text, for everybody on the way to read: set tls_cert "
            "and tls_key, unless what is in front speaks TLS",
            at,
        )


def _refuse_taken_socket(listen: str) -> None:
    """gRPC takes a Unix socket away from a process that is serving on it. Raises RuntimeError instead."""
    if not listen.startswith("unix:"):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(listen.removeprefix("unix:"))
        except OSError:
            return
    raise RuntimeError("another process serves there")


class Health(health_aio.HealthServicer):  # type: ignore[misc]  # untyped upstream
    """Standard health whose watchers can be sent away: their streams never end, and would hold up a drain."""

    def __init__(self) -> None:
        super().__init__()
        self._dismissed = asyncio.Event()
        self._watchers = 0

    async def leave(self, names: Sequence[str], *, still_serves: bool) -> None:
        """Says NOT_SERVING of all names, and gives who watches a moment to hear it, if it `still_serves`."""
        for name in names:
            await self.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._watchers and still_serves:
            await asyncio.sleep(_NOTICE_S)

    def dismiss_watchers(self) -> None:
        """Ends every Watch, now and from now on."""
        self._dismissed.set()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802
        """Streams a status until the client leaves or the service does."""
        tasks = {
            asyncio.create_task(super().Watch(request, context)),
            asyncio.create_task(self._dismissed.wait()),
        }
        self._watchers += 1
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._watchers -= 1
            for task in tasks:
                task.cancel()


class RequestGate(grpc.aio.ServerInterceptor):
    """Around every request: readiness, deadline, caller, trace, and errors as statuses with details."""

    def __init__(
        self,
        default_deadline_s: float,
        door: Door | None = None,
        *,
        max_deadline_s: float = 600.0,
        max_requests: int = 1024,
    ) -> None:
        """Without a `door`, everybody comes in as an anonymous caller."""
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        self._max_requests = max_requests
        self._door = door or Door()
        self._intake = Intake()
        self._visitors = Visitors()
        self._running = 0
        self._open = False

    def open(self, request_bytes: Mapping[str, int] | None = None) -> None:
        """Lets requests through, each of at most so many bytes as its method's path says."""
        self._intake.limit(request_bytes or {})
        self._intake.watch()
        telemetry.watch("hiprune.running", lambda: self._running, pool="requests")
        telemetry.measure("hiprune.running.limit", self._max_requests, pool="requests")
        self._open = True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps our own methods; and health and reflection, see `hiprune.visitors`."""
        handler = await continuation(details)
        if handler is None:
            return None
        if not details.method.startswith("/hiprune."):
            return self._visitors.guard(handler)
        # On the wire one request is a stream of one. To gRPC it is one here: it then hands over the call
        # before the request's body has come, and we ask for that when we know who calls and until when; and
        # an answer counts as being served until it has been sent. Bodies come as bytes: one that cannot be
        # parsed is refused like any other bad input.
        return grpc.stream_stream_rpc_method_handler(self._guarded(details.method, handler))

    def _guarded(self, method: str, handler: Any) -> Callable[..., Awaitable[None]]:
        parse: Parse = handler.request_deserializer
        serialise: Callable[[Message], bytes] = handler.response_serializer

        # not a generator: one that waits for a slow client could neither be timed out nor closed in time
        async def guarded(_: object, context: Context) -> None:
            with telemetry.Served(method, context.invocation_metadata()) as served:
                try:
                    async with (
                        self._request(context, method, served),
                        self._intake.message(method, await _body(context), parse) as asked,
                    ):
                        if not handler.response_streaming:
                            # its message is let go: sending takes two copies of the bytes already
                            answer = serialise(await handler.unary_unary(asked, context))
                            with self._intake.answer(len(answer)):
                                await context.write(answer)
                            return
                        async with aclosing(handler.unary_stream(asked, context)) as messages:
                            async for message in messages:
                                await context.write(serialise(message))
                except Exception as error:
                    await _abort(context, error, served)

        return guarded

    @asynccontextmanager
    async def _request(self, context: Context, method: str, served: telemetry.Served) -> AsyncIterator[None]:
        """A request's place, deadline and caller.

        Raises Unavailable before the service is ready; Exhausted; Expired; and as `Door.admit`.
        """
        if not self._open:
            raise Unavailable("the service is starting", reason="NOT_READY", retry_after_s=1)
        if self._running >= self._max_requests:
            # not gRPC's `maximum_concurrent_rpcs`, which would count health, and not say when to come back
            raise Exhausted(f"{self._running} requests are being served, no more at a time", retry_after_s=1)
        left = context.time_remaining()
        seconds = self._default_deadline_s if left is None else float(left)
        seconds = min(seconds, self._max_deadline_s)
        if seconds <= 0:
            raise Expired("the deadline had passed when the request arrived")
        deadlines.begin(seconds)
        limit = asyncio.timeout(seconds)
        self._running += 1
        try:
            async with limit, self._door.admit(context, method):
                served.tenant = auth.current().tenant.name
                yield
        except TimeoutError as error:
            if not limit.expired():  # somebody else's: a socket's, a library's
                raise
            raise Expired("the deadline passed before the answer was ready") from error
        finally:
            self._running -= 1


async def _body(context: Context) -> bytes:
    """The request, as bytes. Raises InvalidInput for a call without one."""
    body = await context.read()
    if body is grpc.aio.EOF:
        raise InvalidInput("the call brings no request", reason="MISSING_FIELD")
    whole: bytes = body
    return whole


async def _abort(context: Context, error: Exception, served: telemetry.Served) -> None:
    """Ends the request with the error's status; what was not foreseen goes to the log, not to the client."""
    if isinstance(error, grpc.aio.AbortError | grpc.aio.InternalError):
        raise error  # ended already; or the client left while an answer was being written
    if not isinstance(error, HipruneError):
        log.error("unforeseen error", exc_info=error)
        error = Internal("internal error; the service's log has the cause")
    elif isinstance(error, Internal):
        log.error("internal error", exc_info=error)
    served.failed(error.code, error.reason)
    status = rpc_status.to_status(to_status(error))
    if isinstance(error, Unavailable) and _was_retried(error):
        status = status._replace(trailing_metadata=(*status.trailing_metadata, NO_RETRY))
    await context.abort_with_status(status)


def _was_retried(error: BaseException | None) -> bool:
    """Whether it is a peer's answer that no further attempt would change: see `hiprune.calls`."""
    seen = set()
    while (
        error is not None and id(error) not in seen
    ):  # `raise error.under(…) from error` may be its own cause
        if isinstance(error, HipruneError) and error.retried:
            return True
        seen.add(id(error))
        error = error.__cause__
    return False
