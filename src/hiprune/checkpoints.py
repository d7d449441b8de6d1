"""A checkpoint on disk: where it is, what it holds, and its identity. Loads no weights.

Only safetensors files are read, and only their headers are parsed; pickled checkpoints are refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hiprune.families import Facts, UnsupportedModel, facts_of

PREPROCESSING_VERSION: Final = "pil-1"
"""Names how pixels are prepared beyond the checkpoint's own settings; change it when that changes."""

_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_MAX_HEADER_BYTES: Final = 100 * 2**20


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message names the path, the key or file, and what was expected."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file: where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Hugging Face directory of a supported family."""

    path: Path
    config: Mapping[str, Any]
    facts: Facts
    vision_digest: str
    """SHA-256 (hex) over normalised name, dtype, shape and bytes of every vision tensor."""
    preprocessing_digest: str
    """SHA-256 (hex) over the image processor's settings."""

    @property
    def name(self) -> str:
        """What users call it: the directory's own name."""
        return self.path.name


def open_checkpoint(model: str) -> Checkpoint:
    """The checkpoint behind a directory or hub id. Raises CheckpointError."""
    path = locate(model)
    config = read_json(path / "config.json")
    try:
        facts = facts_of(config)
    except UnsupportedModel as error:
        raise CheckpointError(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: config.json has no {error}") from error
    vision = {
        facts.vision_keys.sub("", tensor.name, count=1): tensor
        for tensor in stored_tensors(path)
        if facts.vision_keys.match(tensor.name)
    }
    if not vision:
        raise CheckpointError(
            f"{path}: no vision tensor (no key matches {facts.vision_keys.pattern!r}): "
            "is this a language-only checkpoint?"
        )
    return Checkpoint(path, config, facts, digest_of(vision), _preprocessing_digest(path))


def locate(model: str) -> Path:
    """The directory of a model: itself, or the local snapshot of a hub id. Raises CheckpointError."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"model {model!r}: not a directory, and not a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises a dozen kinds, for network, access and names
        raise CheckpointError(f"model {model!r}: not a directory, and the hub gave {error}") from error


def locate_paired(setting: str, checkpoint: Checkpoint) -> Path | None:
    """The directory of the paired CLIP; None when there is none, and text similarity is off.

    `setting` is a directory or hub id; "none"; or empty: a `clip` directory beside the model, else the
    family's own hub id. A paired model that was named must be there: raises CheckpointError.
    """
    if setting == "none" or checkpoint.facts.text_keys is not None:
        return None
    if setting:
        return locate(setting)
    beside = checkpoint.path.parent / "clip"
    if (beside / "config.json").is_file():
        return beside
    try:
        return locate(checkpoint.facts.paired_text_model) if checkpoint.facts.paired_text_model else None
    except CheckpointError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON {type(content).__name__}, expected an object")
    return content


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of a directory's safetensors files. Raises CheckpointError on a damaged file."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file (pickled weights are not read)")
    for file in files:
        yield from _tensors_in(file)


def _tensors_in(path: Path) -> Iterator[StoredTensor]:
    """Header of one file: 8 bytes of length, JSON, then the bytes that the JSON's offsets point into."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: truncated: {size} bytes, its header alone claims {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    base = 8 + length
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if base + end > size:
            raise CheckpointError(f"{path}: truncated: {size} bytes, {name} ends at {base + end}")
        yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, base + start, base + end)


def digest_of(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 (hex) over normal name, dtype, shape and bytes of every tensor, in the order of the names.

    Hashing a large tower takes seconds, so the answer is remembered by the files' path, size and time.
    """
    files = sorted({tensor.path for tensor in tensors.values()})
    identity = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps([identity, sorted(tensors)]).encode()).hexdigest()
    remembered = _remembered()
    if key in remembered:
        return remembered[key]
    digest = hashlib.sha256(b"hiprune-tensors-1")
    maps = {file: _mapped(file) for file in files}
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with memoryview(maps[tensor.path])[tensor.start : tensor.end] as view:
            digest.update(view)
    for each in maps.values():
        each.close()
    _remember(key, digest.hexdigest())
    return digest.hexdigest()


def digest_of_all(path: Path) -> str:
    """SHA-256 (hex) over every tensor of a directory: a paired text model's identity."""
    return digest_of({tensor.name: tensor for tensor in stored_tensors(path)})


def text_digest(checkpoint: Checkpoint, paired: Path | None) -> str:
    """Identity (SHA-256, hex) of what turns a question into a vector; empty when nothing does.

    That is the paired CLIP in `paired`, or the language model's input embeddings where the family compares
    in their space.
    """
    if checkpoint.facts.text_keys is not None:
        return digest_of({"embeddings": text_embeddings(checkpoint)})
    return digest_of_all(paired) if paired is not None else ""


def text_embeddings(checkpoint: Checkpoint) -> StoredTensor:
    """Where the language model's input embeddings (vocabulary, H) lie. Raises CheckpointError."""
    keys = checkpoint.facts.text_keys
    for tensor in stored_tensors(checkpoint.path):
        if keys is not None and keys.fullmatch(tensor.name):
            return tensor
    raise CheckpointError(
        f"{checkpoint.path}: no input embeddings (no key matches {keys.pattern if keys else None!r})"
    )


def require_complete(info: Mapping[str, Collection[Any]], *, part: str, path: Path) -> None:
    """Refuses a partly loaded model: transformers fills missing weights with noise and only logs it."""
    for kind in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind, ()))
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{path}: {part}: {kind.replace('_', ' ')}: {', '.join(keys[:3])}{more}: "
                "is this the right checkpoint?"
            )


def image_processor_settings(path: Path) -> dict[str, Any]:
    """The image processor's settings, from either file that transformers writes them to."""
    processor = path / "processor_config.json"
    if processor.is_file():
        nested = read_json(processor).get("image_processor")
        if isinstance(nested, dict):
            return nested
    return read_json(path / "preprocessor_config.json")


def _preprocessing_digest(path: Path) -> str:
    # the class that applies the settings is ours to choose, and differs between checkpoints' writers
    settings = {
        key: value
        for key, value in image_processor_settings(path).items()
        if key not in {"image_processor_type", "processor_class", "feature_extractor_type"}
    }
    canonical = json.dumps([PREPROCESSING_VERSION, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _memory_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hiprune" / "digests.json"


def _remembered() -> dict[str, str]:
    try:
        content = json.loads(_memory_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(key: str, digest: str) -> None:
    # a read-only home costs a second at the next start and nothing else
    file = _memory_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(_remembered() | {key: digest}), "utf-8")
        scratch.replace(file)
    except OSError:
        return
