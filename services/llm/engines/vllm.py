"""vLLM in this process's keeping: continuous batches, paged keys and values, several GPUs and machines.

What enters is what enters transformers' engine: embeddings and positions. vLLM runs in processes of its own
and cannot be trusted with what it does not expect (a row of another width ends it for good), so everything is
checked here. The language model's weights are read where they lie; see `vllm_plugin`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import shlex
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import torch

from hiprune import telemetry
from hiprune.checkpoints import CheckpointError
from hiprune.config import ConfigError
from hiprune.errors import Internal, Unavailable
from hiprune.language_part import has_mrope
from services.llm.engines import packing
from services.llm.engines.adapters import LoraAdapter
from services.llm.engines.base import POSITIONS_END, Job, Step
from services.llm.engines.defaults import (
    end_tokens,
    read_generation_config,
    refuse_beyond,
    seed_for_vllm,
)
from services.llm.engines.embeddings import EmbeddingTable
from services.llm.engines.stages import AnswerStages
from services.llm.engines.vllm_plugin import ARCHITECTURES, PENALTY, PENALTY_KEY, language_config
from services.llm.families import LanguagePart
from services.llm.placement import Placement

if TYPE_CHECKING:
    from vllm import SamplingParams

log = logging.getLogger("hiprune.llm")

_LOOK_EVERY_S: Final = 0.1
_STOP_S: Final = 1.0
"""For vLLM's processes to end by themselves; on a CPU they never do in its own 5 s, and nobody listens."""
_OURS: Final = frozenset(
    {
        "model",
        "hf-overrides",
        "skip-tokenizer-init",
        "enable-prompt-embeds",
        "dtype",
        "max-num-seqs",
        "generation-config",
        "logits-processors",
        "runner",
        "tokenizer",
        "enable-lora",
        "lora-modules",
        "max-loras",
        "max-lora-rank",
        "max-cpu-loras",
    }
)
"""Arguments of vLLM's that the service answers for."""


class VllmEngine:
    """A language model in vLLM's `AsyncLLM`."""

    name = "vllm"

    def __init__(
        self,
        path: Path,
        language: LanguagePart,
        placement: Placement,
        max_concurrency: int,
        arguments: str = "",
        adapters: Sequence[LoraAdapter] = (),
    ) -> None:
        """`arguments` are vLLM's own, as on its command line. Raises ConfigError, CheckpointError."""
        self._path = path
        self._config = language.config.get_text_config()
        self._placement = placement
        if self._config.model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: the engine vllm has no class of ours for {self._config.model_type!r}, expected one "
                f"of {', '.join(ARCHITECTURES)}"
            )
        self._mrope = has_mrope(self._config)
        self._adapters = adapters
        self._arguments = read_arguments(arguments, path, adapters)
        self._max_concurrency = max_concurrency
        self._table = EmbeddingTable(path, placement)
        self._defaults = read_generation_config(path, self._config)
        refuse_beyond(self._defaults, path, self.name)
        self.end_tokens = end_tokens(self._defaults)
        self.context_length = int(self._config.max_position_embeddings)
        # vLLM looks sines up in a table that it makes four times as long as the context, for long videos; a
        # position beyond it would end its engine for everybody
        self.positions_end = 4 * self.context_length if self._mrope else POSITIONS_END
        self._engine: Any = None
        self._lora: dict[str, Any] = {}
        self.blocks_held = 0.0
        """Share of all blocks of keys and values that running answers hold, at vLLM's last step."""

    async def start(self) -> None:
        """Loads the weights in processes of vLLM's. Raises CheckpointError, ConfigError."""
        self._engine = await asyncio.to_thread(self._load)
        await self._load_adapters()
        self.context_length = int(self._engine.model_config.max_model_len)
        log.info("language model in vLLM, context %d", self.context_length)

    async def stop(self) -> None:
        """Ends every generation and vLLM's processes."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown, timeout=_STOP_S)
            self._engine = None

    async def failed(self) -> str:
        """Returns when vLLM can generate no more, which it never can again, and says so."""
        while self._engine is None or not self._engine.errored:  # noqa: ASYNC110  # another process's end
            await asyncio.sleep(_LOOK_EVERY_S)
        return "vLLM's engine has ended"

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings, (T, H)."""
        return self._table.rows(token_ids)

    async def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`. Raises Unavailable once vLLM has ended, Internal for what it refuses."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = await asyncio.to_thread(self._prompt, job)
        adapter = self._lora[job.adapter] if job.adapter else None
        with AnswerStages() as stages:
            try:
                outputs = self._engine.generate(
                    prompt, self._parameters(job), uuid.uuid4().hex, lora_request=adapter
                )
                async with aclosing(outputs):
                    async for output in outputs:
                        for token in output.outputs[0].token_ids:
                            stages.token()
                            yield Step(int(token), int(output.num_cached_tokens or 0))
            except EngineDeadError as error:
                raise Unavailable("the language model's engine has ended", retry_after_s=5) from error
            except (EngineGenerateError, ValueError) as error:
                raise Internal("the language model's engine refused the prompt") from error

    def _prompt(self, job: Job) -> dict[str, Any]:
        """The prompt as vLLM takes it, checked: a wrong one would end its engine. Blocks. Raises Internal."""
        rows, positions = job.prompt.embeddings, job.prompt.positions
        length = len(rows)
        if rows.ndim != 2 or rows.shape[1] != self._table.width or rows.dtype != self._placement.dtype:
            raise Internal(
                f"a prompt of shape {tuple(rows.shape)} and {rows.dtype}, expected (S, {self._table.width}) "
                f"and {self._placement.dtype}"
            )
        if not 1 <= length < self.context_length:
            raise Internal(f"a prompt of {length} tokens, expected 1 to {self.context_length - 1}")
        prompt: dict[str, Any] = {"prompt_embeds": rows.detach().cpu().contiguous()}
        salt = [job.owner, job.adapter]
        if self._mrope:
            if positions.shape != (3, length):
                raise Internal(f"positions of shape {tuple(positions.shape)}, expected (3, {length})")
            where = positions.cpu().numpy()
            if where.min() < 0 or where.max() + job.max_tokens >= self.positions_end:
                raise Internal(
                    f"positions from {where.min()} to {where.max()} and {job.max_tokens} behind them, "
                    f"expected 0 to {self.positions_end - 1}"
                )
            try:
                prompt["prompt_token_ids"] = packing.pack(where)
            except packing.DoNotFit as error:
                raise Internal(str(error)) from error
            prompt["prompt_is_token_ids"] = [False] * length
            # vLLM knows blocks by their embeddings; a token means another thing at another place. Behind the
            # last medium positions count on by one, so a conversation that goes on in words keeps its salt.
            salt.append(hashlib.sha256(where[:, : job.prompt.media_end].tobytes()).hexdigest())
        elif positions.shape != (length,):
            raise Internal(f"positions of shape {tuple(positions.shape)}, expected ({length},)")
        prompt["cache_salt"] = hashlib.sha256("\0".join(salt).encode()).hexdigest()
        return prompt

    def _parameters(self, job: Job) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = {}
        penalty = self._defaults.repetition_penalty or 1.0
        if penalty != 1.0:
            extra[PENALTY_KEY] = {"penalty": penalty, "prompt": list(job.token_ids)}
        return SamplingParams(
            temperature=job.sampling.temperature,
            top_p=job.sampling.top_p,
            seed=seed_for_vllm(job.sampling.seed),
            max_tokens=job.max_tokens,
            stop_token_ids=sorted(self.end_tokens),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra or None,
        )

    def _load(self) -> Any:
        # it would tell its makers on which hardware it runs
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # a fork would take gRPC's and torch's threads along, and hang
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        if self._mrope:
            # the second runner hands a model zeros where the positions of a prompt of embeddings travel
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        from vllm.v1.engine.async_llm import AsyncLLM

        from services.llm.engines.vllm_models import Listener

        arguments = dataclasses.replace(
            self._arguments,
            hf_overrides=language_config,
            skip_tokenizer_init=True,
            enable_prompt_embeds=True,
            dtype=str(self._placement.dtype).removeprefix("torch."),
            max_num_seqs=self._max_concurrency,
            generation_config="vllm",
            logits_processors=[PENALTY],
        )
        try:
            return AsyncLLM.from_engine_args(arguments, stat_loggers=[partial(Listener, self._tell)])
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self._path}: vLLM did not start: {error}") from error

    async def _load_adapters(self) -> None:
        """Now and not with the first request that names one. Raises CheckpointError for what vLLM refuses."""
        from vllm.lora.request import LoRARequest

        for number, each in enumerate(self._adapters, start=1):
            self._lora[each.name] = LoRARequest(each.name, number, str(each.path))
            try:
                await self._engine.add_lora(self._lora[each.name])
            except Exception as error:  # whatever kind vLLM's process sent it as
                await self.stop()
                raise CheckpointError(f"{each.path}: vLLM does not take this adapter: {error}") from error
            log.info("adapter %r of rank %d from %s", each.name, each.rank, each.path)

    def _tell(self, blocks_held: float) -> None:
        self.blocks_held = blocks_held
        telemetry.measure("hiprune.engine.blocks_held", blocks_held)


def read_arguments(text: str, model: Path, adapters: Sequence[LoraAdapter] = ()) -> Any:
    """vLLM's `AsyncEngineArgs` for a model and what would stand on its command line.

    Raises ConfigError, CheckpointError.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"vllm_args (--vllm-args): {text!r} is no list of words: {error}") from error
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("_", "-").removeprefix("no-")
        if word.startswith("--") and name in _OURS:
            raise ConfigError(f"vllm_args (--vllm-args): {word} is decided by the service's own settings")
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    words = [f"--model={model}", *_for_adapters(adapters), *words]
    try:
        parsed, unknown = parser.parse_known_args(words)
    except (SystemExit, Exception) as error:  # argparse exits for some mistakes, whatever it was asked
        raise ConfigError(f"vllm_args (--vllm-args): {text!r}: {error}") from error
    if unknown:
        raise ConfigError(f"vllm_args (--vllm-args): vLLM has no argument {unknown[0]!r}")
    if parsed.enforce_eager and parsed.pipeline_parallel_size > 1 and _on_cpu():
        raise ConfigError(
            "vllm_args (--vllm-args): --enforce-eager leaves out vLLM's warm-up, without which its groups of "
            "layers on a CPU end at the first prompt: leave it out, or pipeline_parallel_size at 1"
        )
    return AsyncEngineArgs.from_cli_args(parsed)


def _for_adapters(adapters: Sequence[LoraAdapter]) -> list[str]:
    """vLLM's arguments for adapters, all of which stay loaded. Raises CheckpointError for too high a rank."""
    from vllm.config.lora import MaxLoRARanks

    if not adapters:
        return []
    highest = max(adapters, key=lambda each: each.rank)
    ranks = [rank for rank in get_args(MaxLoRARanks) if rank >= highest.rank]
    if not ranks:
        raise CheckpointError(
            f"{highest.path}: a rank of {highest.rank}, expected at most {max(get_args(MaxLoRARanks))}"
        )
    # on a CPU, vLLM 0.32 answers those without an adapter from the last place when others of their batch have
    # one (`bgmv_shrink` takes -1 for an index): that place stays empty
    places = len(adapters) + _on_cpu()
    many = [f"--max-loras={places}", f"--max-cpu-loras={places}"]
    return ["--enable-lora", f"--max-lora-rank={ranks[0]}", *many]


def _on_cpu() -> bool:
    """Whether this is vLLM's build for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.device_type == "cpu")
