"""The llm, as the gateway calls it: with the key that the client sent, and with nothing of its own.

Who may ask is the llm's to decide: it knows the tenants, the gateway does not. So the client's
`authorization` goes on as it came, and is neither looked at nor logged. That leaves one way to open a door by
mistake: a gateway on the network before an llm that takes everybody, because on its own socket or loopback
address it may. `admit` closes it. Knows gRPC; knows no HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from typing import Final, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hiprune import deadlines, telemetry
from hiprune.auth import KEY_HEADER, is_private
from hiprune.calls import Line, call
from hiprune.errors import HipruneError, Unauthenticated, Unavailable, from_rpc
from hiprune.v1 import llm_service_pb2, llm_service_pb2_grpc
from services.gateway.settings import Settings

log = logging.getLogger("hiprune.gateway")

_PROBE_S: Final = 2.0
_TRUSTED_S: Final = 60.0
"""How long it is believed that the llm refuses strangers, once it did."""

Event = llm_service_pb2.AskImageResponse


class _Stubs(NamedTuple):
    image_qa: llm_service_pb2_grpc.ImageQaServiceAsyncStub
    language_model: llm_service_pb2_grpc.LanguageModelServiceAsyncStub
    health: health_pb2_grpc.HealthStub


def _stubs(channel: grpc.aio.Channel) -> _Stubs:
    return _Stubs(
        llm_service_pb2_grpc.ImageQaServiceStub(channel),
        llm_service_pb2_grpc.LanguageModelServiceStub(channel),
        health_pb2_grpc.HealthStub(channel),
    )


class Backend:
    """The llm. Belongs to its event loop."""

    def __init__(self, settings: Settings) -> None:
        """Connects when first used. Raises ConfigError for certificates that cannot be used."""
        self._line = Line(settings.llm, _stubs, settings)
        self._default_s = settings.default_deadline_ms / 1000
        self.keys_only: Final = not (settings.allow_anonymous or is_private(settings.listen))
        """Whether nobody is served without a key that the llm knows."""
        self._trusted_until_s = 0.0

    async def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        await self._line.close()

    async def ask(
        self, request: llm_service_pb2.AskImageRequest, authorization: str
    ) -> AsyncGenerator[Event, None]:
        """The events of an answer as they come. Closing the generator cancels it. Raises HipruneError."""
        timeout_s = deadlines.for_next_hop(self._default_s)
        try:
            with telemetry.Call(request) as trace_context:
                metadata = (*trace_context, *_credentials(authorization))
                events = self._line.stub().image_qa.AskImage(request, timeout=timeout_s, metadata=metadata)
                del request  # its images, for as long as the answer takes
                try:
                    async for event in events:
                        yield event
                finally:
                    events.cancel()
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, peer="llm") from error

    async def describe(self, authorization: str) -> llm_service_pb2.GetLanguageModelResponse:
        """The model behind, for who has this key: also the way to find out whether it is one.

        Raises HipruneError.
        """
        return await call(
            self._line.stub().language_model.GetLanguageModel,
            llm_service_pb2.GetLanguageModelRequest(),
            llm_service_pb2.GetLanguageModelResponse,
            peer="llm",
            default_s=self._default_s,
            metadata=_credentials(authorization),
        )

    async def admit(self) -> None:
        """Whether requests may be passed on at all. Raises Unavailable.

        Beyond this machine, and without `allow_anonymous`, only to an llm that refuses who has no key: it is
        asked without one, once a minute.
        """
        if not self.keys_only or time.monotonic() < self._trusted_until_s:
            return
        try:
            await self.describe("")
        except Unauthenticated:
            self._trusted_until_s = time.monotonic() + _TRUSTED_S
            return
        except HipruneError as error:
            raise Unavailable("the llm cannot be asked whether it refuses strangers") from error
        log.error(
            "nothing is served: listen reaches beyond this machine and the llm takes requests without a key. "
            "Give the llm tenants, or set allow_anonymous (--allow-anonymous) here if everybody may ask"
        )
        raise Unavailable("the llm behind this gateway serves strangers, which is not allowed here")

    async def not_ready(self) -> str:
        """Why requests cannot be answered now; empty when they can."""
        try:
            status = await self._line.stub().health.Check(
                health_pb2.HealthCheckRequest(service=""), timeout=_PROBE_S
            )
            if status.status != health_pb2.HealthCheckResponse.SERVING:
                return "the llm is not ready"
            await self.admit()
        except grpc.aio.AioRpcError:
            return "the llm cannot be reached"
        except Unavailable as error:
            return str(error)
        return ""


def _credentials(authorization: str) -> tuple[tuple[str, str], ...]:
    """As metadata. Raises Unauthenticated for what gRPC could not send."""
    if not (authorization.isascii() and authorization.isprintable()):
        raise Unauthenticated("the header `authorization` holds characters that no key has")
    return ((KEY_HEADER, authorization),) if authorization else ()
