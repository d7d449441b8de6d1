"""A complete Qwen2.5-VL of random weights: config, weights in either layout, tokenizer, template, settings.

The tokenizer is the embedded model's with Qwen's special tokens behind it, the chat template says what
Qwen's says. Weights are drawn wide enough that greedy answers vary and feel every position.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from hiprune.config import EMBEDDED_MODEL

Layout = Literal["hub", "model"]
LAYOUTS: Final[tuple[Layout, ...]] = ("hub", "model")
"""How checkpoints lie on disk: keys `visual.…`, `model.layers.…` and a flat config.json (Qwen's own), or keys
`model.visual.…`, `model.language_model.layers.…` and a nested one (transformers' own)."""

PATCH: Final = 8
MERGED: Final = 2 * PATCH
"""Pixels along the side of one merged token."""

_SPECIAL: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_RENAMES: Final[dict[Layout, tuple[tuple[str, str], ...]]] = {
    "hub": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "model": (),
}
_TEMPLATE: Final = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
<|vision_start|><|image_pad|><|vision_end|>\
{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_qwen2_5_vl(
    path: Path,
    seed: int = 0,
    *,
    layout: Layout = "hub",
    tied: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    vision_layers: int = 8,
    vision_hidden: int = 48,
    full_blocks: tuple[int, ...] = (1, 3, 5, 7),
    text_layers: int = 3,
    text_hidden: int = 64,
    heads: int = 2,
    key_value_heads: int = 1,
    tokens_per_second: int = 2,
    min_tokens: int = 4,
    max_tokens: int = 64,
) -> Path:
    """Writes the directory and returns it. Same arguments, same bytes; torch's global generator is not used.

    Windows of 2×2 merged tokens, images of `min_tokens` to `max_tokens`. `tied` leaves the output matrix out.
    """
    backend = json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text("utf-8"))
    first = len(backend["model"]["vocab"])
    ids = {token: first + place for place, token in enumerate(_SPECIAL)}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": 4,
            "patch_size": PATCH,
            "window_size": 2 * MERGED,
            "fullatt_block_indexes": list(full_blocks),
            "out_hidden_size": text_hidden,
            "tokens_per_second": tokens_per_second,
        },
        text_config={
            "vocab_size": first + len(_SPECIAL) + 1,
            "hidden_size": text_hidden,
            "intermediate_size": 2 * text_hidden,
            "num_hidden_layers": text_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": 4096,
            "rope_theta": 1000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": _sections(text_hidden // heads // 2)},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": tied,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.dtype = dtype
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    if layout == "hub":  # whose config.json has the language model's fields beside those of the whole
        content = json.loads((path / "config.json").read_text("utf-8"))
        rope = content["text_config"].pop("rope_parameters")
        content |= {key: value for key, value in content.pop("text_config").items() if key not in content}
        content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {**rope, "type": "mrope"}}
        _write(path / "config.json", content)
    with torch.device("meta"):
        shapes = Qwen2_5_VLForConditionalGeneration(config).state_dict()
    weights = _weights({name: tuple(each.shape) for name, each in shapes.items()}, seed, layout, tied, dtype)
    _save(path, weights, shards)
    _save_text_files(path, backend, ids)
    _save_settings(path, ids, min_tokens, max_tokens)
    return path


def _sections(frequencies: int) -> list[int]:
    """Time, rows and columns share the rotary frequencies as Qwen's 16, 24 and 24 of 64 do."""
    rows = frequencies * 3 // 8
    return [frequencies - 2 * rows, rows, rows]


def _weights(
    shapes: dict[str, tuple[int, ...]], seed: int, layout: Layout, tied: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for name in sorted(shapes):
        if tied and name == "lm_head.weight":
            continue
        shape = shapes[name]
        if len(shape) == 1:  # norms and biases
            base = 1.0 if re.search(r"(norm\w*|ln_q)\.weight$", name) else 0.0
            tensor = base + 0.05 * torch.randn(shape, generator=generator)
        elif "embed_tokens" in name:
            tensor = 0.3 * torch.randn(shape, generator=generator)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            tensor = 1.5 * torch.randn(shape, generator=generator) / fan_in**0.5
        key = name
        for pattern, replacement in _RENAMES[layout]:
            key = re.sub(pattern, replacement, key)
        stored[key] = tensor.to(dtype).contiguous()
    return stored


def _save(path: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """One file, or several with an index, keys dealt out so that each holds some of every part."""
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    files = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[number::shards]}
        save_file(part, path / name, metadata={"format": "pt"})
        files |= dict.fromkeys(part, name)
    _write(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _save_text_files(path: Path, backend: dict[str, Any], ids: dict[str, int]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    backend["added_tokens"] += [{"id": number, "content": token, **flags} for token, number in ids.items()]
    backend["post_processor"] = None  # no token before the first
    _write(path / "tokenizer.json", backend)
    tokenizer = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "model_max_length": 4096,
        "extra_special_tokens": [],
    }
    _write(path / "tokenizer_config.json", tokenizer)
    (path / "chat_template.jinja").write_text(_TEMPLATE, "utf-8")


def _save_settings(path: Path, ids: dict[str, int], min_tokens: int, max_tokens: int) -> None:
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": min_tokens * MERGED**2,
        "max_pixels": max_tokens * MERGED**2,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    generation = {
        "eos_token_id": [ids["<|im_end|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
    }
    _write(path / "preprocessor_config.json", preprocessor)
    _write(path / "generation_config.json", generation)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), "utf-8")
