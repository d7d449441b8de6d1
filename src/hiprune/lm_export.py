"""The language model of a vision-language checkpoint as one of its own, for servers that know no other.

Our own engines read it where it lies. A file that holds nothing else, under the names that such a server
wants, is linked; of the others the language model's bytes are copied, by the system, so that a file system
that can share them does. Nothing is unpacked, so the size of a checkpoint does not matter. Knows files; loads
no weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from hiprune.checkpoints import CheckpointError, StoredTensor, stored_tensors
from hiprune.language_part import has_mrope, language_config, language_name

ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
"""What stock classes are called, by `model_type`."""

_BESIDE: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What goes with a language model, where it is there."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made."""

    tensors: int
    copied_bytes: int
    linked_files: int


def export_language_model(
    source: Path, target: Path, step: Callable[[int, int], object] = lambda done, total: None
) -> Exported:
    """Writes `target`, which must not be there or be empty; `step` hears of bytes copied, and of how many.

    Raises CheckpointError for what is no checkpoint, or has positions that no stock server computes.
    """
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target}: is there already, and not empty")
    config = _language_config(source)
    shards = _shards(source)
    total = sum(each.end - each.start for plan in shards if not plan.linked for each, _ in plan.tensors)
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    copied = 0
    weight_map: dict[str, str] = {}
    for number, plan in enumerate(shards, start=1):
        name = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        if plan.linked:
            (target / name).symlink_to(plan.path.resolve())
        else:
            for size in _write(plan, target / name):
                copied += size
                step(copied, total)
        weight_map |= {new: name for _, new in plan.tensors}
    if len(shards) > 1:
        size = sum(each.end - each.start for plan in shards for each, _ in plan.tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    for beside in _BESIDE:
        if (source / beside).is_file():
            shutil.copyfile(source / beside, target / beside)
    return Exported(len(weight_map), copied, sum(plan.linked for plan in shards))


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    tensors: Sequence[tuple[StoredTensor, str]]
    linked: bool
    """It holds the language model alone, under its own names."""


def _shards(source: Path) -> list[_Shard]:
    """Files that hold some of the language model. Raises CheckpointError where none does."""
    found = []
    for path, group in groupby(stored_tensors(source), key=lambda each: each.path):
        tensors = list(group)
        named = [(each, name) for each in tensors if (name := language_name(each.name)) is not None]
        if named:
            as_it_is = len(named) == len(tensors) and all(each.name == name for each, name in named)
            found.append(_Shard(path, named, as_it_is))
    if not found:
        raise CheckpointError(f"{source}: holds no tensor of a language model that is known here")
    return found


def _language_config(source: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json: {error}") from error
    text = language_config(config)
    if has_mrope(text):
        raise CheckpointError(
            f"{source}: {text.model_type} has positions of three axes, which no stock server of language "
            "models computes for pruned images: use the engine vllm, which needs no export"
        )
    if text.model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{source}: the language model is {text.model_type!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    text.dtype = text.dtype or config.dtype
    text.architectures = [ARCHITECTURES[text.model_type]]
    return text


def _write(plan: _Shard, target: Path) -> Iterator[int]:
    """Writes a safetensors file of a part of another: the bytes of each tensor, as they are copied."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for each, name in plan.tensors:
        size = each.end - each.start
        header[name] = {
            "dtype": each.dtype,
            "shape": list(each.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with plan.path.open("rb") as source, target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        for each, _ in plan.tensors:
            yield _copy(source.fileno(), file.fileno(), each.start, each.end - each.start)


def _copy(source: int, target: int, start: int, size: int) -> int:
    """Bytes of one open file to the end of another."""
    done = 0
    while done < size:
        moved = _move(source, target, start + done, size - done)
        if moved == 0:
            raise CheckpointError(f"a file ended {size - done} bytes early")
        done += moved
    return done


def _move(source: int, target: int, start: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, size, offset_src=start)
        except OSError:  # file systems that cannot
            pass
    return os.write(target, os.pread(source, min(size, 2**24), start))
