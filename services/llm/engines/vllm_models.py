"""Classes of vLLM's with our changes; see `vllm_plugin`. Imported where vLLM is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Final

import torch
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.utils import WeightsMapper
from vllm.sampling_params import SamplingParams
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from hiprune.language_part import LAYOUTS, language_name
from services.llm.engines.packing import unpack
from services.llm.engines.vllm_plugin import PENALTY_KEY

_AXES: Final = 3
STORED_NAMES: Final = WeightsMapper(orig_to_new_regex={re.compile(old): new for old, new in LAYOUTS.items()})
"""Of a checkpoint's layouts, in which adapters and quantisation name what they are about."""


def language_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's among a checkpoint's weights, by vLLM's names."""
    for stored, tensor in weights:
        if (name := language_name(stored)) is not None:
            yield name, tensor


class LanguagePart:
    """What the classes below share: a language model that is part of a checkpoint, prompted by embeddings."""

    embedding_modules: ClassVar[dict[str, str]] = {}
    """None that an adapter could change: see `services.llm.engines.adapters`."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes what is the language model's."""
        return super().load_weights(language_weights(weights))  # type: ignore[misc]


class HipruneLlama(LanguagePart, LlamaForCausalLM):
    """Llama and Vicuna, as in LLaVA-1.5, LLaVA-NeXT and Video-LLaVA."""

    hf_to_vllm_mapper = LlamaForCausalLM.hf_to_vllm_mapper | STORED_NAMES


class HipruneMistral(LanguagePart, MistralForCausalLM):
    """Mistral, as in LLaVA-NeXT."""

    hf_to_vllm_mapper = MistralForCausalLM.hf_to_vllm_mapper | STORED_NAMES


class HipruneQwen2(LanguagePart, Qwen2ForCausalLM):
    """Qwen2, as in LLaVA-NeXT and LLaVA-OneVision."""

    hf_to_vllm_mapper = Qwen2ForCausalLM.hf_to_vllm_mapper | STORED_NAMES


class HipruneQwen2MRope(HipruneQwen2, SupportsMRoPE):
    """Qwen2.5-VL's language model: positions of three axes, packed into the prompt's token ids."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions (3, S), and what to add to a later token's number to have its position.

        Decoding goes on from the last position, as stock `generate` does. A prompt of zeros is vLLM's own, to
        warm up: it counts from 0.
        """
        length = len(input_tokens)
        if not any(input_tokens):
            return torch.arange(length).expand(_AXES, length), 0
        positions = torch.from_numpy(unpack(input_tokens, _AXES))
        return positions, int(positions[0, -1]) + 1 - length


class PromptPenalty(AdapterLogitsProcessor):
    """transformers' repetition penalty over the prompt's tokens, placeholders included, and the answer's.

    vLLM's own would look for the prompt's tokens where positions are.
    """

    def is_argmax_invariant(self) -> bool:
        """It can change which token is the likeliest."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """None for a request without one."""
        given = (params.extra_args or {}).get(PENALTY_KEY)
        if given is None:
            return None
        penalty, prompt = float(given["penalty"]), [int(token) for token in given["prompt"]]

        def penalise(answer: list[int], logits: torch.Tensor) -> torch.Tensor:
            """`logits` (vocabulary,)"""
            # a token counts once however often it occurred
            seen = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
            score = logits[seen]
            logits[seen] = torch.where(score < 0, score * penalty, score / penalty)
            return logits

        return penalise


class Listener(StatLoggerBase):
    """Hears of vLLM's steps, and passes on the share of its blocks that running answers hold."""

    def __init__(self, tell: Callable[[float], None], vllm_config: Any, engine_index: int = 0) -> None:
        self._tell = tell

    def record(self, scheduler_stats: Any, *rest: Any, **more: Any) -> None:
        """After each step; vLLM promises little of what comes along."""
        if scheduler_stats is not None:
            self._tell(float(scheduler_stats.kv_cache_usage))

    def log_engine_initialized(self) -> None:
        """Nothing."""
