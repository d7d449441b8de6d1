"""The pruner's gRPC face: decodes, calls, encodes. What it decides is in the modules it calls."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import torch

from hiprune import auth, deadlines, quotas, telemetry, tensors
from hiprune.allowances import check_media
from hiprune.checkpoints import Checkpoint
from hiprune.errors import InvalidInput, Mismatch
from hiprune.telemetry import StageClock, stage, start_clock
from hiprune.v1 import (
    encoder_service_pb2,
    media_pb2,
    pruner_service_pb2,
    pruner_service_pb2_grpc,
)
from hiprune.workers import Workers
from services.pruner import guidance, intake
from services.pruner import policy as policies
from services.pruner.cache import TenantKeys, TokenCache, media_digest
from services.pruner.encoder import Encoded, RemoteEncoder, encoders_fault
from services.pruner.flight import SingleFlight
from services.pruner.policy import Policy
from services.pruner.pruning import NO_QUESTION, Guidance, Pruned, check_views, plan, prune, similarities
from services.pruner.settings import Settings
from services.pruner.text import Chunks, TextEncoder

_Status: TypeAlias = tuple[Encoded, pruner_service_pb2.CacheStatus.ValueType]
"""An encoded image, and where it came from."""
_Result = TypeVar("_Result")
_MAX_WAITING_CHUNKS: Final = 384
"""Of all questions that wait for the text encoder: what CLIP-L reads in a minute, the default deadline."""
_MAX_WAITING_WORK: Final = 2048
"""Of all that waits for a thread, in MiB and one for each: twice what all requests together may hold."""
_COMPARISONS: Final = 2**26
"""Multiply-adds of DIVPRUNE that cost one: the longest costs 257, and seven of those may wait."""
_THREAD_BYTES: Final = 2**20
"""Answers above it are made off the event loop."""
NO_TEXT_MODEL: Final = "this pruner has no paired text encoder, so a question cannot guide it"


class PrunerServicer(pruner_service_pb2_grpc.PrunerServiceServicer):
    """Prunes tokens and images."""

    _checkpoint: Checkpoint
    _text: TextEncoder | None
    _cache: TokenCache
    _encoder: RemoteEncoder

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._records_cls = False  # whether the encoder's last answer held attention from CLS
        self._flights: SingleFlight[bytes, _Status] = SingleFlight()
        # one thread: the text encoder is not for several
        self._reader = Workers(1, "text", waiting_for="for the text encoder", max_waiting=_MAX_WAITING_CHUNKS)
        # threads of our own: asyncio's default ones may all be waiting for a name server
        self._workers = Workers(
            2, "prune", waiting_for="for the pruner's threads", max_waiting=_MAX_WAITING_WORK
        )
        # what compares tokens takes seconds where the others take milliseconds: it holds up its like alone
        self._comparer = Workers(
            1, "compare", waiting_for="for tokens to be compared", max_waiting=_MAX_WAITING_WORK
        )

    def equip(
        self,
        checkpoint: Checkpoint,
        text: TextEncoder | None,
        cache: TokenCache,
        encoder: RemoteEncoder,
    ) -> None:
        """Gives it what it works with; no request arrives before (see `hiprune.server.RequestGate`)."""
        self._checkpoint = checkpoint
        self._text = text
        self._cache = cache
        self._encoder = encoder
        self._reader.watch()
        self._workers.watch()
        self._comparer.watch()

    async def GetPruner(self, request: Any, context: Any) -> pruner_service_pb2.GetPrunerResponse:  # noqa: N802
        """Says which model's images this pruner serves."""
        default = policies.resolve(pruner_service_pb2.PrunePolicy(), self._checkpoint.facts)
        return pruner_service_pb2.GetPrunerResponse(
            fingerprint=encoder_service_pb2.ModelFingerprint(
                family=self._checkpoint.facts.family,
                vision_digest=self._checkpoint.vision_digest,
                preprocessing_digest=self._checkpoint.preprocessing_digest,
                hidden_size=self._checkpoint.facts.hidden_size,
                layers=self._checkpoint.facts.layers,
                paired_digest=self._text.digest if self._text else "",
            ),
            default_policy=default.to_proto(),
            deep_layer=self._checkpoint.facts.deep_layer,
            text_model=self._text.name if self._text else "",
            cache_store=self._cache.store.name,
        )

    async def PruneTokens(  # type: ignore[override]  # noqa: N802
        self, request: pruner_service_pb2.PruneTokensRequest, context: Any
    ) -> bytes:
        """Prunes the caller's own tokens. The answer is a PruneTokensResponse, serialised."""
        clock = start_clock()
        if not 1 <= len(request.views) <= self._settings.max_views:
            raise InvalidInput(
                f"{len(request.views)} views, expected 1 to {self._settings.max_views}", field="views"
            )
        cost, tenant = _cost_of(request.views), auth.current().tenant

        def look() -> tuple[Policy, Chunks]:
            check_views(request.views, max_tokens=self._settings.max_tokens)
            policy = _policy_of_tokens(request, tenant.complete(request.policy))
            return policy, self._chunks_of_tokens(request, policy)

        policy, chunks = await self._workers.run(look, cost)
        vector = await self._text_vector(chunks)

        def work(is_wanted: Callable[[], bool]) -> Pruned:
            compared = self._guidance_of_tokens(request, policy, vector)
            return _prune_tokens(request.views, policy, compared, is_wanted)

        pruned = await self._select(work, request.views, policy)
        await _charge(pruned.summary, is_paid=policy.reads_features)

        def answer() -> bytes:
            response = pruner_service_pb2.PruneTokensResponse
            whole = response(summary=pruned.summary, timings=clock.to_proto()).SerializeToString()
            # messages one behind the other are one, and the interpreter is held for one view at a time
            views = [response(views=[view]).SerializeToString() for view in pruned.views]
            return b"".join((*views, whole))

        return await self._workers.run(answer, cost)

    async def PruneImage(  # type: ignore[override]  # noqa: N802
        self, request: pruner_service_pb2.PruneImageRequest, context: Any
    ) -> pruner_service_pb2.PruneImageResponse | bytes:
        """Encodes an image, or takes it from the cache, and prunes it. A large answer comes serialised."""
        clock = start_clock()
        tenant = auth.current().tenant
        policy = policies.resolve(tenant.complete(request.policy), self._checkpoint.facts)
        question = request.question.strip()
        self._check_question(question, policy)

        def look() -> tuple[bytes, Chunks]:
            intake.check(request.media, self._settings)
            check_media(request.media, tenant.limits, field="media")
            return media_digest(request.media), self._chunks(question, policy)

        digest, chunks = await self._workers.run(look)
        keys = self._cache.keys(tenant.name)
        pruned = await self._cache.get_pruned(keys, digest, policy, question)
        if pruned is not None:
            await _charge(pruned.summary)
            return await self._answer(pruned, pruner_service_pb2.CACHE_STATUS_PRUNED_HIT, policy, clock)
        reading = asyncio.create_task(self._text_vector(chunks))  # while the encoder works
        try:
            encoded, status = await self._encoded(request.media, policy, keys, digest, clock)
            pruned = await self._prune(encoded, policy, await reading, digest)
        finally:
            reading.cancel()
        self._cache.put_pruned(keys, digest, policy, question, pruned)
        await _charge(pruned.summary, is_paid=policy.reads_features)
        return await self._answer(pruned, status, policy, clock)

    async def close(self) -> None:
        """Finishes background work."""
        if hasattr(self, "_cache"):
            await self._cache.close()
        self._reader.close()
        self._workers.close()
        self._comparer.close()

    async def _answer(
        self,
        media: pruner_service_pb2.PrunedMedia,
        status: pruner_service_pb2.CacheStatus.ValueType,
        policy: Policy,
        clock: StageClock,
    ) -> pruner_service_pb2.PruneImageResponse | bytes:
        """The answer, a large one as bytes that a thread has made."""
        make = functools.partial(_answer, media, status, policy, clock)
        size = sum(tensors.length_of(view.features) for view in media.views)
        if size <= _THREAD_BYTES:
            return make()
        return await self._workers.run(lambda: make().SerializeToString(), 1 + size // 2**20)

    async def _prune(
        self, encoded: Encoded, policy: Policy, vector: torch.Tensor | None, digest: bytes
    ) -> pruner_service_pb2.PrunedMedia:
        """Selection over an encoded image, off the event loop. Raises Mismatch."""
        if policy.reads_cls and not encoded.has_cls_scores:
            raise Mismatch(
                "the encoder does not record attention from CLS: upgrade it", field="policy.method"
            )

        def work(is_wanted: Callable[[], bool]) -> pruner_service_pb2.PrunedMedia:
            guidance = NO_QUESTION
            if vector is not None and self._text is not None:
                space = self._checkpoint.facts.compares
                found = similarities(encoded.image.views, vector, space=space, memory=encoded.memory)
                guidance = Guidance(found, self._text.name)
            views, memory = encoded.image.views, encoded.memory
            pruned = prune(views, policy, guidance, seed=digest, memory=memory, is_wanted=is_wanted)
            return pruner_service_pb2.PrunedMedia(
                views=pruned.views,
                summary=pruned.summary,
                vision_digest=self._checkpoint.vision_digest,
                layout=encoded.image.layout,
            )

        with encoders_fault():
            return await self._select(work, encoded.image.views, policy)

    async def _select(
        self,
        work: Callable[[Callable[[], bool]], _Result],
        views: Sequence[encoder_service_pb2.View],
        policy: Policy,
    ) -> _Result:
        """Runs a selection off the event loop. Raises InvalidInput, Exhausted, as `work`.

        What compares tokens has a thread of its own and is paid for before, as it is known what it keeps.
        """
        cost, workers = _cost_of(views), self._workers
        if policy.reads_features:
            planned = plan(views, policy)
            cost, workers = cost + planned.work // _COMPARISONS, self._comparer
            await quotas.current().reserve(planned.kept, sum(planned.counts))
        with stage("select"):
            return await workers.run_wanted(work, cost)

    async def _encoded(
        self, media: media_pb2.Media, policy: Policy, keys: TenantKeys, digest: bytes, clock: StageClock
    ) -> _Status:
        """The encoded image with all that the policy reads, from the cache or the encoder."""
        facts = self._checkpoint.facts
        # half of the time for another pruner's work, half for one's own
        wait_s = (deadlines.remaining_s() or self._settings.default_deadline_ms / 1000) / 2
        # more than this policy reads, where an entry is kept: it then serves every later policy and question
        layers = {facts.object_layer, facts.deep_layer, policy.object_layer}
        keeps = policy.reads_text or self._cache.store.name != "off"
        aligned = self._text is not None and facts.compares == "aligned" and keeps
        cached = await self._cache.get_encoded(keys, digest)
        if cached is not None:
            if self._serves(cached, layers, aligned, policy):
                return Encoded(cached), pruner_service_pb2.CACHE_STATUS_ENCODED_HIT
            # replaced by the union, so that two policies do not drive each other out
            layers |= {entry.layer for entry in cached.views[0].attention}
            aligned = aligned or cached.views[0].HasField("aligned")
        request = encoder_service_pb2.EncodeImageRequest(media=media, layers=sorted(layers), aligned=aligned)

        # aligned and layers are part of the key: a flight without them must not serve who needs them
        flight = keys.claim(digest, layers, aligned)

        async def find() -> _Status | None:
            image = await self._cache.get_encoded(keys, digest, again=True)
            if image is None or not self._serves(image, layers, aligned, policy):
                return None
            return Encoded(image), pruner_service_pb2.CACHE_STATUS_ENCODED_HIT

        async def make() -> tuple[_Status, asyncio.Future[None]]:
            encoded = await self._encoder.encode(request, self._workers)
            self._records_cls = encoded.has_cls_scores
            stored = self._cache.put_encoded(keys, digest, encoded.image, encoded.memory)
            return (encoded, pruner_service_pb2.CACHE_STATUS_MISS), stored

        with stage("encode"):
            encoded, status = await self._flights.run(
                flight,
                lambda: self._cache.replicas.once(flight, find=find, make=make, wait_s=wait_s),
            )
        clock.extend(encoded.timings)
        return encoded, status

    def _serves(
        self,
        image: encoder_service_pb2.EncodeImageResponse,
        layers: set[int],
        aligned: bool,
        policy: Policy,
    ) -> bool:
        """Whether a cached image holds the scores of these layers, and `aligned` if that is wanted.

        Earlier versions did not record attention from CLS. It is wanted where the policy reads it, and where
        the encoder would send it: while an old one does not, what it encoded is as good as it gets.
        """
        wants_cls = policy.reads_cls or self._records_cls
        held = {
            entry.layer for entry in image.views[0].attention if entry.HasField("cls_scores") or not wants_cls
        }
        return layers <= held and (image.views[0].HasField("aligned") or not aligned)

    def _chunks(self, question: str, policy: Policy) -> Chunks:
        """The question as the text encoder reads it; none when the method reads no text or there is none.

        Raises InvalidInput for one that would keep it busy for too long.
        """
        if not policy.reads_text or not question or self._text is None:
            return ()
        chunks = self._text.split(question)
        if len(chunks) > (most := self._settings.max_text_chunks):
            raise InvalidInput(
                f"{len(chunks)} chunks of {len(chunks[0])} tokens of text, expected at most {most}",
                field="question",
                reason="LIMIT_EXCEEDED",
            )
        return chunks

    async def _text_vector(self, chunks: Chunks) -> torch.Tensor | None:
        """The vector (A,) of a question's chunks, or None of none."""
        if not chunks or self._text is None:
            return None
        with stage("text"):
            return await self._reader.run_wanted(functools.partial(self._text.embed, chunks), len(chunks))

    def _chunks_of_tokens(self, request: pruner_service_pb2.PruneTokensRequest, policy: Policy) -> Chunks:
        """A request's question as the text encoder reads it.

        A question needs this pruner's own text model, and so tokens of this pruner's own tower: raises
        Mismatch, InvalidInput.
        """
        if not policy.reads_text or request.WhichOneof("guidance") != "question":
            return ()
        question = request.question.strip()
        self._check_question(question, policy)
        if request.vision_digest != self._checkpoint.vision_digest:
            raise Mismatch(
                f"{request.vision_digest[:12]!r} is not the tower of this pruner's text model, "
                f"{self._checkpoint.vision_digest[:12]!r}; send text_vector or similarity instead",
                field="vision_digest",
            )
        guidance.require(request.views, self._checkpoint.facts.compares)
        return self._chunks(question, policy)

    def _guidance_of_tokens(
        self, request: pruner_service_pb2.PruneTokensRequest, policy: Policy, vector: torch.Tensor | None
    ) -> Guidance:
        """What HIPRUNE_PLUS_PLUS compares the caller's tokens with. Raises InvalidInput."""
        if not policy.reads_text:
            return Guidance()
        match request.WhichOneof("guidance"):
            case "question" if vector is not None and self._text is not None:
                space = self._checkpoint.facts.compares
                found = similarities(request.views, vector, space=space, field="question")
                return Guidance(found, self._text.name)
            case "text_vector":
                return guidance.of_vector(request)
            case "similarity":
                return guidance.of_similarity(request)
            case _:
                return NO_QUESTION

    def _check_question(self, question: str, policy: Policy) -> None:
        """Refuses a question that is too long, and one that nothing here can read."""
        if len(question) > self._settings.max_text_chars:
            raise InvalidInput(
                f"{len(question)} characters, expected at most {self._settings.max_text_chars}",
                field="question",
                reason="LIMIT_EXCEEDED",
            )
        if policy.reads_text and question and self._text is None:
            raise Mismatch(NO_TEXT_MODEL, field="policy.method", reason="NO_TEXT_MODEL")


def _cost_of(views: Sequence[encoder_service_pb2.View]) -> int:
    """What work over views costs: one, and one more for each MiB that their tensors are said to hold."""
    size = sum(max(0, tensors.length_of(view.features)) for view in views)
    size += sum(max(0, tensors.length_of(view.aligned)) for view in views)
    return 1 + min(size // 2**20, _MAX_WAITING_WORK // 2)


async def _charge(summary: pruner_service_pb2.PruneSummary, *, is_paid: bool = False) -> None:
    """Counts the tokens that were kept, where this is the first service of the request. Raises Exhausted."""
    if not is_paid:
        await quotas.current().reserve(summary.tokens_kept, summary.tokens_before)
    if summary.tokens_before:
        method = pruner_service_pb2.Method.Name(summary.policy.method).removeprefix("METHOD_").lower()
        telemetry.observe("hiprune.retention", summary.tokens_kept / summary.tokens_before, method=method)


def _answer(
    media: pruner_service_pb2.PrunedMedia,
    status: pruner_service_pb2.CacheStatus.ValueType,
    policy: Policy,
    clock: StageClock,
) -> pruner_service_pb2.PruneImageResponse:
    response = pruner_service_pb2.PruneImageResponse(media=media, cache=status, timings=clock.to_proto())
    # a ratio and its count share an entry, so the policy is reported as this caller spelled it; in the
    # answer's own copy, since the original may still be on its way to the store
    response.media.summary.policy.CopyFrom(policy.to_proto())
    return response


def _policy_of_tokens(
    request: pruner_service_pb2.PruneTokensRequest, policy: pruner_service_pb2.PrunePolicy
) -> Policy:
    """The policy over a stranger's tokens: the layers default to the lowest and the highest that came."""
    layers = sorted({entry.layer for view in request.views for entry in view.attention}) or [1]
    deep_layer = request.deep_layer if request.HasField("deep_layer") else layers[-1]
    if deep_layer < 1:
        raise InvalidInput(f"{deep_layer}, expected at least 1", field="deep_layer")
    entries = (entry for view in request.views for entry in view.attention)
    has_cls = any(entry.layer == deep_layer and entry.HasField("cls_scores") for entry in entries)
    object_layer = min(layers[0], deep_layer)
    return policies.resolve_layers(policy, object_layer=object_layer, deep_layer=deep_layer, has_cls=has_cls)


def _prune_tokens(
    views: Sequence[encoder_service_pb2.View],
    policy: Policy,
    guidance: Guidance,
    is_wanted: Callable[[], bool],
) -> Pruned:
    """Prunes a stranger's checked views; RANDOM's seed is read from the tokens, for want of an image."""
    is_random = policy.method == pruner_service_pb2.METHOD_RANDOM
    return prune(views, policy, guidance, seed=_seed_of(views) if is_random else b"", is_wanted=is_wanted)


def _seed_of(views: Iterable[encoder_service_pb2.View]) -> bytes:
    """A digest of the tokens, where there is no image to take one of."""
    digest = hashlib.sha256(b"hiprune tokens 1")
    for view in views:
        digest.update(view.features.data or b"".join(entry.scores.data for entry in view.attention))
    return digest.digest()
