"""A checkpoint on disk: where it is, what it holds, and its identity. Loads no weights.

Only safetensors files are read, and only their headers are parsed; pickled checkpoints are refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hiprune.families import Facts, UnsupportedModel, facts_of

log = logging.getLogger("hiprune.checkpoints")

_PROJECTOR: Final = "multi_modal_projector."

PREPROCESSING_VERSION: Final = "pil-1"
"""Names how pixels are prepared beyond the checkpoint's own settings; change it when that changes."""

_SETTINGS: Final = ["*.json"]
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
    """SHA-256 (hex) over normalised name, dtype, shape and bytes of every vision tensor, and the settings
    by which the tower computes with them."""
    preprocessing_digest: str
    """SHA-256 (hex) over the image processor's settings."""

    @property
    def name(self) -> str:
        """What users call it: the directory's own name, or the hub id."""
        return name_of(self.path)


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
    except (TypeError, ValueError, ArithmeticError) as error:  # a null, a word, a patch of no size
        raise CheckpointError(f"{path}: config.json: {error}") from error
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
    return Checkpoint(path, config, facts, _vision_digest(vision, config), _preprocessing_digest(path))


def locate(model: str, *, weights: bool = True) -> Path:
    """The directory of a model: itself, or the local snapshot of a hub id. Raises CheckpointError.

    Without `weights` only settings are fetched from the hub.
    """
    folder = os.path.expanduser(
        model
    )  # os.path, unlike Path, takes anything: an unknown ~user, no name at all
    if os.path.isdir(folder):
        return Path(folder).resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"model {model!r}: not a directory, and not a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES if weights else _SETTINGS))
    except Exception as error:  # the hub client raises a dozen kinds, for network, access and names
        raise CheckpointError(f"model {model!r}: not a directory, and the hub gave {error}") from error


def name_of(path: Path) -> str:
    """A checkpoint's name: its directory's; of a snapshot from the hub the id, not the revision's hash."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


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
    if not checkpoint.facts.paired_text_model:
        return None
    try:
        path = locate(checkpoint.facts.paired_text_model)
        next(stored_tensors(path))  # some hub ids hold pickled weights alone
    except CheckpointError as error:
        log.warning("the family's paired text model cannot be used: %s", error)
        return None
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON {type(content).__name__}, expected an object")
    return content


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of the files that transformers would load. Raises CheckpointError on a damaged file."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: no weight_map of keys to files")
        files = [path / name for name in sorted(set(shards.values()))]
    else:
        raise CheckpointError(
            f"{path}: no model.safetensors and no {index.name} (pickled weights are not read)"
        )
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
            header = dict(json.loads(file.read(length)))
        header.pop("__metadata__", None)
        tensors = [_stored(name, entry, path, base=8 + length) for name, entry in header.items()]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    for tensor in tensors:
        if tensor.end > size:
            raise CheckpointError(f"{path}: truncated: {size} bytes, {tensor.name} ends at {tensor.end}")
    yield from tensors


def _stored(name: str, entry: Mapping[str, Any], path: Path, *, base: int) -> StoredTensor:
    """One entry of a header. Raises ValueError, TypeError or KeyError for what is none."""
    start, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError(f"{name} ends before it starts")
    shape = tuple(int(extent) for extent in entry["shape"])
    return StoredTensor(name, str(entry["dtype"]), shape, path, base + start, base + end)


def digest_of(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 (hex) over normal name, dtype, shape and bytes of every tensor, in the order of the names.

    Hashing a large tower takes seconds, so the answer is remembered by the files' path, size and times.
    """
    files = sorted({tensor.path for tensor in tensors.values()})
    identity = [[str(file), *_stamp(file.stat())] for file in files]
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
    """SHA-256 (hex) over a directory's tensors, settings and tokenizer: a text model's identity."""
    tensors = digest_of({tensor.name: tensor for tensor in stored_tensors(path)})
    return _combined(tensors, [read_json(path / "config.json"), _tokenizer_digest(path)])


def text_digest(checkpoint: Checkpoint, paired: Path | None) -> str:
    """Identity (SHA-256, hex) of what turns a question into a vector; empty when nothing does.

    That is the paired CLIP in `paired`, or the language model's input embeddings where the family compares
    in their space.
    """
    if checkpoint.facts.text_keys is not None:
        tensors = {"embeddings": text_embeddings(checkpoint)}
        if checkpoint.facts.compares == "aligned":  # through the projector, which is then part of it
            for tensor in stored_tensors(checkpoint.path):
                _, found, name = tensor.name.partition(_PROJECTOR)
                if found:
                    tensors[found + name] = tensor
        return _combined(digest_of(tensors), _tokenizer_digest(checkpoint.path))
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


def _video_processor_settings(path: Path) -> Any:
    """The video processor's settings, from either file that transformers writes them to; none without one."""
    for name, key in (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None)):
        if (path / name).is_file():
            content = read_json(path / name)
            found = content.get(key) if key else content
            if found:
                return found
    return None


def _vision_digest(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> str:
    """Equal weights under another number of heads or another feature layer are another tower."""
    chosen = {key: value for key, value in config.items() if key.startswith("vision_")}
    return _combined(digest_of(tensors), chosen)


def _tokenizer_digest(path: Path) -> str:
    file = path / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _combined(digest: str, settings: Any) -> str:
    """SHA-256 (hex) over a digest of tensors and the settings that they are used with."""
    canonical = json.dumps([digest, _essential(settings)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _essential(settings: Any) -> Any:
    """A configuration less what its writer notes down about itself."""
    if not isinstance(settings, dict):
        return settings
    noise = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
    return {key: _essential(value) for key, value in settings.items() if key not in noise}


def _preprocessing_digest(path: Path) -> str:
    # the class that applies the settings is ours to choose, and differs between checkpoints' writers
    settings = {
        key: value
        for key, value in image_processor_settings(path).items()
        if key not in {"image_processor_type", "processor_class", "feature_extractor_type"}
    }
    settings["video"] = _video_processor_settings(path)
    canonical = json.dumps([PREPROCESSING_VERSION, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does. Another model's file may share size and mtime: layers of images do."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _memory_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hiprune" / "digests.json"


def _remembered() -> dict[str, str]:
    try:
        content = json.loads(_memory_file().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: an account without a home
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: digest for key, digest in content.items() if isinstance(digest, str)}


def _remember(key: str, digest: str) -> None:
    # a read-only home, or none, costs a second at the next start and nothing else
    try:
        file = _memory_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(_remembered() | {key: digest}), "utf-8")
        scratch.replace(file)
    except (OSError, RuntimeError):
        return
