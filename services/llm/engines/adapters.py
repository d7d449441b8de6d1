"""LoRA adapters that the operator lists, judged before an engine sees them. Knows no engine.

An adapter may change the layers of the language model, and nothing else. The input embeddings, the projector
and the vision tower work outside of the engine, where an adapter would change nothing, and nobody would know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hiprune.checkpoints import CheckpointError, read_json
from hiprune.config import ConfigError
from hiprune.language_part import language_name

_SETTING: Final = "lora_adapters (--lora-adapters)"
_ITEM: Final = re.compile(r"(?P<name>[\w.:/@-]{1,200})=(?P<path>[^=].*)", re.ASCII)
_MATRIX: Final = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_[AB]\.weight$")
_WEIGHTS: Final = "adapter_model.safetensors"
_OUTSIDE: Final = frozenset({"embed_tokens", "lm_head"})


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """One adapter as PEFT writes it."""

    name: str
    """As a request's `model` may give it."""
    path: Path
    """Its directory."""
    rank: int
    """The largest of its matrices'."""


def read_adapters(text: str, model: str) -> tuple[LoraAdapter, ...]:
    """The adapters of `NAME=DIR,NAME=DIR`, each checked; `model` is the name that is taken.

    Raises ConfigError for what is no such list, CheckpointError for what is no such adapter.
    """
    found: dict[str, LoraAdapter] = {}
    for item in filter(None, (each.strip() for each in text.split(","))):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ConfigError(f"{_SETTING}: got {item!r}, expected NAME=DIR")
        name = match["name"]
        if name == model or name in found:
            raise ConfigError(f"{_SETTING}: {name!r} names two things, expected names that differ")
        found[name] = _read(name, Path(match["path"]).expanduser().resolve())
    return tuple(found.values())


def refuse_adapters(text: str, engine: str) -> None:
    """For engines that take none. Raises ConfigError."""
    if text:
        raise ConfigError(f"{_SETTING}: got {text!r}, which the engine {engine} does not take: use vllm")


def _read(name: str, path: Path) -> LoraAdapter:
    config = read_json(path / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{path}: adapter_config.json: peft_type is {config['peft_type']!r}, not 'LORA'"
        )
    for field in ("target_modules", "modules_to_save"):
        for target in _listed(config.get(field)):
            if target.rpartition(".")[2] in _OUTSIDE:
                raise CheckpointError(
                    f"{path}: adapter_config.json: {field} has {target!r}; prompts are made of the model's "
                    "own embeddings, so an adapter may change its layers alone"
                )
    if saved := _listed(config.get("modules_to_save")):
        raise CheckpointError(f"{path}: adapter_config.json: modules_to_save has {saved[0]!r}, expected none")
    for module in _modules(path / _WEIGHTS):
        if not (language_name(f"{module}.weight") or "").startswith("model.layers."):
            raise CheckpointError(
                f"{path}: {_WEIGHTS}: changes {module}, expected layers of the language model alone"
            )
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise CheckpointError(
            f"{path}: adapter_config.json: r is {config.get('r')!r}, expected a whole number"
        )
    return LoraAdapter(name, path, max(ranks))


def _listed(value: Any) -> Sequence[str]:
    """What a field names: PEFT takes a list, or one expression for all."""
    if value is None:
        return ()
    return [value] if isinstance(value, str) else [str(each) for each in value]


def _modules(file: Path) -> Sequence[str]:
    """The modules that an adapter's file has matrices for. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    found = dict.fromkeys(match["module"] if (match := _MATRIX.match(name)) else name for name in names)
    if not found:
        raise CheckpointError(f"{file}: holds no tensor")
    return list(found)
