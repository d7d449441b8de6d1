"""What a model's authors say of how it generates, as far as it holds for every request. Knows no engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hiprune.checkpoints import CheckpointError


def read_generation_config(path: Path, config: Any) -> Any:
    """The settings beside a checkpoint, or those that follow from its language model's `config`."""
    from transformers import GenerationConfig

    try:
        stored = GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:
        stored = GenerationConfig.from_model_config(config)
    return deterministic(stored)


def deterministic(stored: Any) -> Any:
    """The model's own generation settings, less those by which its authors like to draw.

    What remains (end tokens, padding, suppressed tokens, penalties) holds for every request.
    """
    settings = copy.deepcopy(stored)
    settings.do_sample = False
    settings.num_beams = 1
    settings.num_return_sequences = 1
    settings.max_length = None
    settings.temperature, settings.top_p, settings.top_k = 1.0, 1.0, 50
    if settings.pad_token_id is None and settings.eos_token_id is not None:
        ends = settings.eos_token_id
        settings.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return settings


def end_tokens(settings: Any) -> frozenset[int]:
    """Tokens that end the model's turn."""
    ends = settings.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [ends] if ends is not None else [])


_HARMLESS: Final[Mapping[str, Any]] = {
    "no_repeat_ngram_size": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_new_tokens": None,
    "min_length": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
}
"""Settings that transformers' own `generate` heeds, and what they are where they do nothing."""


def refuse_beyond(settings: Any, path: Path, engine: str, **harmless: Any) -> None:
    """What the authors set and an engine does not do would change answers: better none at all.

    `harmless` are settings beyond the list above, and their values that do nothing. Raises CheckpointError.
    """
    for name, nothing in {**_HARMLESS, **harmless}.items():
        value = getattr(settings, name, None)
        if value not in (None, nothing):
            raise CheckpointError(
                f"{path}: generation_config.json: {name} is {value!r}, which the engine {engine} does not "
                "do; use the engine transformers"
            )


def seed_for_vllm(seed: int | None) -> int | None:
    """The seed of a draw as vLLM takes it: -1 means none there, and is as good a seed as any here."""
    return 2**62 - 1 if seed == -1 else seed
