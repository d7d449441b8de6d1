"""The routes: what comes in over HTTP, what it becomes for the llm, and what goes back."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, aclosing
from typing import Any, Final, TypeAlias

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hiprune import deadlines
from hiprune.errors import Expired, HipruneError, Internal
from hiprune.v1 import llm_service_pb2
from services.gateway import answers, chat, images, openapi
from services.gateway.answers import Reply
from services.gateway.backend import Backend, Event
from services.gateway.chat import ChatRequest
from services.gateway.errors import HttpError, from_hiprune, unforeseen
from services.gateway.exchange import CLIENT_LEFT, Exchange
from services.gateway.fetch import Fetcher
from services.gateway.intake import ClientLeft, Intake, while_connected
from services.gateway.naming import Naming
from services.gateway.pages import Playground
from services.gateway.settings import Settings
from services.gateway.stream import EventStream
from services.gateway.worker import Worker

log = logging.getLogger("hiprune.gateway")

TIMEOUT: Final = "x-request-timeout"
"""Seconds that a client gives its request."""
_SDK_TIMEOUT: Final = "x-stainless-read-timeout"
"""How long OpenAI's clients wait for a next byte: of an answer in one piece, for all of it."""
Endpoint: TypeAlias = Callable[["Gateway", Request], Awaitable[Response]]


def _answered(endpoint: Endpoint) -> Endpoint:
    """Around each endpoint: its span and its line in the log, and errors as OpenAI has them."""

    @functools.wraps(endpoint)
    async def answered(self: Gateway, request: Request) -> Response:
        with ExitStack() as ends:
            route = request.scope["route"].path
            rpc = "AskImage" if request.method == "POST" else "GetLanguageModel"
            exchange = ends.enter_context(Exchange(request.method, route, request.headers, rpc))
            try:
                response = await endpoint(self, request)
            except HttpError as error:
                response = _refusal(error, exchange)
            except HipruneError as error:
                if isinstance(error, Internal):
                    log.error("internal error", exc_info=error)
                response = _refusal(from_hiprune(error), exchange)
            except ClientLeft:
                exchange.failed(CLIENT_LEFT, "client_left")
                response = Response(status_code=CLIENT_LEFT)
            except Exception:
                log.exception("unforeseen error")
                response = _refusal(unforeseen(), exchange)
            exchange.status = response.status_code
            response.headers["x-request-id"] = exchange.id
            if isinstance(response, EventStream):
                response.ends_with(exchange, ends.pop_all())
        return response

    return answered


def _refusal(error: HttpError, exchange: Exchange | None = None) -> Response:
    """An error as a response."""
    if exchange is not None:
        exchange.failed(error.status, error.code)
    return Response(error.body(), error.status, error.headers, media_type="application/json")


class Gateway:
    """What the routes share."""

    def __init__(self, settings: Settings, backend: Backend, fetcher: Fetcher) -> None:
        self._settings = settings
        self._backend = backend
        self._fetcher = fetcher
        self._worker = Worker()
        self.intake = Intake(settings)

    @_answered
    async def chat(self, request: Request) -> Response:
        """Answers a conversation about images."""
        async with AsyncExitStack() as held:
            held.enter_context(self.intake.request())
            deadlines.begin(self._settings.max_deadline_ms / 1000)
            await self._backend.admit()
            key = _authorization(request)
            _check_json(request)
            announced = request.headers.get("content-length")

            known = False

            async def vouch() -> None:
                nonlocal known
                if not known:
                    await self._backend.describe(key)
                known = True

            if self._backend.keys_only:
                await vouch()  # nothing is read of strangers
            async with self.intake.body(request.receive, announced, vouch) as body:
                size = len(body)
                asked = await self._worker.run(size, functools.partial(chat.read_chat, body))
                body.clear()  # here and below: images, of which one copy is enough
                deadlines.begin(self._seconds(request, streamed=bool(asked.stream)))
                await held.enter_async_context(while_connected(request.receive))
                message = await self._message(asked, size, vouch)
                naming, reply, streamed = Naming.of(asked), Reply(asked), asked.stream
                del asked
                events = await held.enter_async_context(aclosing(self._backend.ask(message, key)))
                del message
                try:
                    report = await _report(events)
                except HipruneError as error:
                    raise from_hiprune(error, naming) from error
            headers = answers.headers_of(report)
            if streamed:
                return EventStream(_chunks(reply, report, events, self._worker), headers, held.pop_all())
            try:
                content = await _whole(reply, report, events, self._worker)
            except HipruneError as error:
                raise from_hiprune(error, naming) from error
            return Response(content, headers=headers, media_type="application/json")

    @_answered
    async def models(self, request: Request) -> Response:
        """The models served."""
        served = await self._models(request)
        return JSONResponse({"object": "list", "data": served})

    @_answered
    async def model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["model"]
        for each in await self._models(request):
            if each["id"] == name:
                return JSONResponse(each)
        raise HttpError(
            404,
            "the model is not served here: GET /v1/models lists those that are",
            kind="not_found_error",
            code="model_not_found",
            param="model",
        )

    async def healthz(self) -> Response:
        """Whether the process lives."""
        return JSONResponse({"status": "alive"})

    async def readyz(self) -> Response:
        """Whether requests can be answered: the llm is there, and may be asked."""
        why_not = "this gateway is leaving" if self.intake.draining else await self._backend.not_ready()
        if why_not:
            return JSONResponse({"status": "not ready", "reason": why_not}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def _models(self, request: Request) -> list[dict[str, Any]]:
        with self.intake.request():
            deadlines.begin(self._settings.default_deadline_ms / 1000)
            await self._backend.admit()
            found = await self._backend.describe(_authorization(request))
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "hiprune",
                "engine": found.engine,
                "context_length": found.context_length,
                "family": found.fingerprint.family,
            }
            for name in (found.model, *found.adapters)
        ]

    async def _message(
        self, asked: ChatRequest, size: int, vouch: Callable[[], Awaitable[None]]
    ) -> llm_service_pb2.AskImageRequest:
        """The request for the llm, its images in it; `size` is the body's. Raises HipruneError."""
        slots = list(chat.images_of(asked))
        most = self._settings.max_images
        if len(slots) > most:
            raise HttpError(
                400,
                f"{slots[most].field}: is image {most + 1} of the conversation, expected at most {most}",
                code="limit_exceeded",
                param=slots[most].field,
            )
        if any(images.is_remote(slot.url) for slot in slots):
            await vouch()  # nothing is fetched for strangers
        limit = asyncio.timeout(deadlines.remaining_s())
        try:
            async with limit:
                files = await images.load(slots, self._fetcher, self._worker, self._settings.max_image_bytes)
        except TimeoutError as error:
            if not limit.expired():  # somebody else's
                raise
            raise Expired("the deadline passed before the images had come") from error
        return await self._worker.run(size, functools.partial(chat.to_request, asked, files))

    def _seconds(self, request: Request, *, streamed: bool) -> float:
        """The time that a request has. Raises HttpError."""
        longest = self._settings.max_deadline_ms / 1000
        for name in (TIMEOUT, *(() if streamed else (_SDK_TIMEOUT,))):
            said = request.headers.get(name)
            if said is None:
                continue
            try:
                seconds = float(said)
            except ValueError:
                seconds = math.nan
            if not seconds > 0:
                raise HttpError(
                    400,
                    f"the header {name} is no number of seconds",
                    code="invalid_field",
                    param=name,
                )
            return min(seconds, longest)
        return self._settings.default_deadline_ms / 1000


def make_app(gateway: Gateway, playground: Playground) -> FastAPI:
    """The application."""
    app = FastAPI(
        title="hiprune",
        summary="Questions about images, answered from a third of the visual tokens, over OpenAI's chat API",
        version="1",
        docs_url=None,  # the pages would be fetched from another host
        redoc_url=None,
        redirect_slashes=False,
    )

    @app.post(
        "/v1/chat/completions",
        summary="Answer a conversation about images",
        tags=["chat"],
        responses={
            200: {
                "description": "the answer, or its pieces as server-sent events",
                "headers": {
                    name: {"schema": {"type": "string"}}
                    for name in ("x-hiprune-tokens-before", "x-hiprune-tokens-kept", "x-hiprune-cache")
                },
                "content": {
                    **openapi.content("ChatCompletion"),
                    **openapi.content("ChatCompletionChunk", "text/event-stream"),
                },
            },
            **openapi.refusals(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
        },
        openapi_extra={"requestBody": {"required": True, "content": openapi.content("ChatRequest")}},
    )
    async def chat_completions(request: Request) -> Response:
        return await gateway.chat(request)

    @app.get(
        "/v1/models",
        summary="List the models served",
        tags=["models"],
        responses={200: {"content": openapi.content("ModelList")}, **openapi.refusals(401, 503)},
    )
    async def list_models(request: Request) -> Response:
        return await gateway.models(request)

    @app.get(
        "/v1/models/{model:path}",
        summary="Describe a model",
        tags=["models"],
        responses={200: {"content": openapi.content("Model")}, **openapi.refusals(401, 404, 503)},
    )
    async def get_model(request: Request, model: str) -> Response:
        return await gateway.model(request)

    @app.get("/healthz", summary="Whether the process lives", tags=["health"])
    async def healthz() -> Response:
        return await gateway.healthz()

    @app.get("/readyz", summary="Whether requests can be answered", tags=["health"])
    async def readyz() -> Response:
        return await gateway.readyz()

    playground.add_to(app)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        words = {404: "not_found", 405: "method_not_allowed"}
        return _refusal(
            HttpError(
                status,
                f"{request.method} {request.url.path[:200]} is not served here: see GET /openapi.json",
                code=words.get(status, "http_error"),
                headers=getattr(error, "headers", None),
            )
        )

    def describe() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            components = schema.setdefault("components", {})
            components["schemas"] = openapi.schemas()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # FastAPI's word for what is a 400 here
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's own way
    return app


async def _report(events: AsyncGenerator[Event, None]) -> llm_service_pb2.PruningReport:
    """The first event. Raises HipruneError, so that what is wrong is a status and no event of a stream."""
    first = await anext(events, None)
    if first is None or first.WhichOneof("event") != "report":
        raise Internal("the llm's answer does not begin with the report")
    return first.report


async def _chunks(
    reply: Reply,
    report: llm_service_pb2.PruningReport,
    events: AsyncGenerator[Event, None],
    worker: Worker,
) -> AsyncGenerator[bytes, None]:
    yield await worker.run(reply.work(report), functools.partial(reply.opening, report))
    ended = False
    async for event in events:
        if event.WhichOneof("event") == "delta":
            yield reply.delta(event.delta.text)
        else:
            ended = True
            for chunk in reply.closing(event.completion):
                yield chunk
    if not ended:
        raise _cut_short()


async def _whole(
    reply: Reply,
    report: llm_service_pb2.PruningReport,
    events: AsyncGenerator[Event, None],
    worker: Worker,
) -> bytes:
    texts = []
    completion = None
    async for event in events:
        if event.WhichOneof("event") == "delta":
            texts.append(event.delta.text)
        else:
            completion = event.completion
    if completion is None:
        raise _cut_short()
    telling = functools.partial(reply.whole, "".join(texts), report, completion)
    return await worker.run(reply.work(report), telling)


def _cut_short() -> Internal:
    return Internal("the llm's answer ended without a completion")


def _authorization(request: Request) -> str:
    """The key, as it came; empty without one. Raises HttpError for two: which would count?"""
    found = request.headers.getlist("authorization")
    if len(found) > 1:
        raise HttpError(
            401, "the header authorization comes twice", kind="authentication_error", code="invalid_api_key"
        )
    return found[0] if found else ""


def _check_json(request: Request) -> None:
    """A web page of anybody's may send other types to any address its reader's browser can reach, unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "the header content-type is not application/json", code="unsupported_media_type")
