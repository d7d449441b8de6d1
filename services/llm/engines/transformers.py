"""The embedded engine: transformers' own `generate`, each answer in a thread of a bounded pool.

What it adds to stock `generate`: tokens stream to the event loop, cancellation takes effect at the next
token, and draws come from a generator of the request's own, so that a seed means the same alone and
beside others and torch's global one is never touched.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from hiprune.loading import load_part
from services.llm.engines.base import POSITIONS_END, Job, Step
from services.llm.engines.defaults import deterministic, end_tokens
from services.llm.engines.stages import AnswerStages
from services.llm.families import LanguagePart, SplicedPrompt
from services.llm.placement import Placement
from services.llm.sampling import Sampling

log = logging.getLogger("hiprune.llm")

# below it a division would overflow float32 and the draw is greedy anyway
_LEAST_TEMPERATURE: Final = 1e-6


class TransformersEngine:
    """The language part of a Hugging Face checkpoint, alone."""

    name = "transformers"

    def __init__(
        self,
        path: Path,
        language: LanguagePart,
        placement: Placement,
        max_concurrency: int,
    ) -> None:
        self._path = path
        self._language = language
        self._placement = placement
        self._pool = ThreadPoolExecutor(max_concurrency, thread_name_prefix="generate")
        self._running: set[threading.Event] = set()
        self._model: Any = None
        self._generation_config: Any = None
        self.context_length = int(language.config.get_text_config().max_position_embeddings)
        self.positions_end = POSITIONS_END
        self.end_tokens: frozenset[int] = frozenset()

    async def start(self) -> None:
        """Loads the weights and generates two tokens. Raises CheckpointError."""
        await asyncio.to_thread(self._load)
        embeddings = await asyncio.to_thread(self.embed, [0, 0])
        prompt = SplicedPrompt(embeddings, torch.arange(2, device=self._placement.device), visual_tokens=0)
        async for _ in self.generate(Job(prompt, [0, 0], Sampling(), max_tokens=2)):
            pass

    async def stop(self) -> None:
        """Ends every generation at its next token and waits for them."""
        for stopped in self._running:
            stopped.set()
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        self._model = None

    @torch.no_grad()
    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings, (T, H)."""
        ids = torch.tensor(list(token_ids), dtype=torch.long, device=self._placement.device)
        embedded: torch.Tensor = self._model.get_input_embeddings()(ids)
        return embedded

    async def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[int | None] = asyncio.Queue()
        stopped = threading.Event()
        relay = _Relay(lambda token: _post(loop, arrived.put_nowait, token))

        def work() -> None:
            if not stopped.is_set():
                self._generate(job, relay, stopped)

        def ended(work: asyncio.Future[None]) -> None:
            arrived.put_nowait(None)
            if not work.cancelled():
                work.exception()  # seen, though whoever left early does not care

        # the request's clock and trace go with it into the thread
        submitted = self._pool.submit(contextvars.copy_context().run, work)
        done = asyncio.wrap_future(submitted)
        done.add_done_callback(ended)
        self._running.add(stopped)
        try:
            while (token := await arrived.get()) is not None:
                yield Step(token)
            done.result()
        finally:
            self._running.discard(stopped)
            stopped.set()
            submitted.cancel()  # where it has not begun
            await asyncio.wait({done})

    def _generate(self, job: Job, relay: _Relay, stopped: threading.Event) -> None:
        """One answer, in a thread of the pool."""
        embeddings, positions = job.prompt.embeddings, job.prompt.positions
        settings = copy.deepcopy(self._generation_config)
        settings.max_new_tokens = job.max_tokens
        processors: list[Callable[..., torch.Tensor]] = []
        if job.token_ids and (settings.repetition_penalty or 1.0) != 1.0:
            processors.append(_PromptPenalty(settings.repetition_penalty, job.token_ids, embeddings.device))
            settings.repetition_penalty = 1.0
        if not job.sampling.greedy:
            processors.append(SeededSampler(job.sampling))
        with relay:
            self._model.generate(
                inputs_embeds=embeddings[None],  # (1, S, H)
                attention_mask=torch.ones((1, len(embeddings)), dtype=torch.long, device=embeddings.device),
                position_ids=positions[..., None, :],  # (1, S) or (axes, 1, S)
                generation_config=settings,
                logits_processor=processors,
                stopping_criteria=[_StopWhen(stopped)],
                streamer=relay,
            )

    def _load(self) -> None:
        model = load_part(
            self._language.model_class,
            self._path,
            part="language model",
            config=self._language.config,
            key_mapping=dict(self._language.key_mapping),
            dtype=self._placement.dtype,
        )
        self._model = model.to(self._placement.device)
        # on the model too, or `generate` fills the gaps from the stored one and warns of the clash
        model.generation_config = self._generation_config = deterministic(model.generation_config)
        self.end_tokens = end_tokens(self._generation_config)
        log.info(
            "language model %s: %.1f M parameters, context %d",
            type(model).__name__,
            sum(each.numel() for each in model.parameters()) / 1e6,
            self.context_length,
        )


class SeededSampler:
    """A logits processor that draws: the drawn token is left at 0, all others at -inf; argmax does the rest.

    The probabilities are transformers' own (its temperature, then its top-p); the draw is made on the CPU
    by a generator that belongs to this request.
    """

    def __init__(self, sampling: Sampling) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers = [TemperatureLogitsWarper(max(sampling.temperature, _LEAST_TEMPERATURE))]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (1, vocabulary) float32."""
        # softmax does not see the shift, and a tiny temperature then only drives scores towards -inf
        warped = scores - scores.max(dim=-1, keepdim=True).values
        for warp in self._warpers:
            warped = warp(input_ids, warped)
        probabilities = warped.softmax(dim=-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=self._generator).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class _PromptPenalty:
    """The model's repetition penalty over the prompt's tokens too, as stock has it when it is given ids.

    A penalty asks which tokens occurred and not how often, so one placeholder stands for all of an image.
    """

    def __init__(self, penalty: float, prompt_ids: Sequence[int], device: torch.device) -> None:
        from transformers import RepetitionPenaltyLogitsProcessor

        self._penalise = RepetitionPenaltyLogitsProcessor(penalty)
        self._prompt = torch.tensor([list(prompt_ids)], device=device)  # (1, T)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        penalised: torch.Tensor = self._penalise(torch.cat((self._prompt, input_ids), dim=1), scores)
        return penalised


class _StopWhen:
    """A stopping criterion that reads an event. transformers asks for a callable, not for its own class."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopped.is_set(), device=input_ids.device)


class _Relay:
    """A streamer that hands tokens on and times the stages."""

    def __init__(self, hand_on: Callable[[int], None]) -> None:
        self._hand_on = hand_on
        self._stages = AnswerStages()
        self._prompt_seen = False

    def __enter__(self) -> None:
        self._stages.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stages.__exit__(*error)

    def put(self, tokens: torch.Tensor) -> None:
        """First the prompt's ids, of which there are none, then one token, (1,), at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._stages.token()
        self._hand_on(int(tokens.item()))

    def end(self) -> None:
        """Nothing is held back."""


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[[int], None], token: int) -> None:
    """Calls back on the loop; a loop that has closed wants no more tokens."""
    try:
        loop.call_soon_threadsafe(callback, token)
    except RuntimeError:
        return
