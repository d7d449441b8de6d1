"""What vLLM loads of ours in each of its processes, by the entry point `vllm.general_plugins`.

vLLM's own classes for language models, each taught two things: to take its weights out of the checkpoint of a
vision-language model where they lie, and, for those with M-RoPE, the positions that a prompt brings along.
Names alone are registered; vLLM imports `vllm_models` when a model of ours is served.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from typing import Any, Final

from hiprune import language_part

ARCHITECTURES: Final = {
    "llama": "HipruneLlama",
    "mistral": "HipruneMistral",
    "qwen2": "HipruneQwen2",
    "qwen2_5_vl_text": "HipruneQwen2MRope",
}
"""Our class for each kind of language model, by transformers' `model_type`."""

MODELS: Final = "services.llm.engines.vllm_models"
PENALTY: Final = f"{MODELS}:PromptPenalty"
"""The logits processor, as vLLM's setting takes it."""
PENALTY_KEY: Final = "hiprune_penalty"
"""What `SamplingParams.extra_args` calls the penalty, and the prompt's tokens."""


def register() -> None:
    """Tells vLLM of the classes. Called by vLLM in each of its processes, perhaps several times."""
    from vllm import ModelRegistry

    parent = multiprocessing.parent_process()
    if parent is not None:
        # an engine whose service was killed would hold its GPU's memory for ever
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent", daemon=True).start()
    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"{MODELS}:{name}")


def _end_with(sentinel: int) -> None:
    """Ends this process when the one that started it has ended."""
    wait([sentinel])
    os._exit(1)


def language_config(config: Any) -> Any:
    """The language model's part of a checkpoint's config, for vLLM's setting `hf_overrides`."""
    if config.get_text_config().model_type not in ARCHITECTURES:
        return config  # vLLM asks about a dummy first, to see what the type becomes
    text = language_part.language_config(config)
    text.architectures = [ARCHITECTURES[text.model_type]]
    return text
