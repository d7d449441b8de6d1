"""A complete LLaVA of random weights, small enough to build in a test: config, weights, tokenizer, template.

The tokenizer and the chat template are the embedded model's. Weights are drawn wide enough that greedy
answers vary and do not hang on the last bit of a sum.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hiprune.config import EMBEDDED_MODEL

WORDS: Final[int] = len(json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
"""Of the embedded model's tokenizer, with which the tiny models read."""

Layout = Literal["flat", "vision_model", "model"]
LAYOUTS: Final[tuple[Layout, ...]] = ("flat", "vision_model", "model")
"""The three key layouts on disk: `vision_tower.encoder.…` (the embedded model's),
`vision_tower.vision_model.encoder.…` (llava-hf's) and `model.vision_tower.encoder.…` (transformers' own)."""

_RENAMES: Final[dict[Layout, tuple[tuple[str, str], ...]]] = {
    "flat": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ),
    "vision_model": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.", ""),
    ),
    "model": (),
}


def make_llava(
    path: Path,
    seed: int = 0,
    *,
    layout: Layout = "flat",
    image_size: int = 64,
    patch_size: int = 8,
    vision_layers: int = 4,
    vision_hidden: int = 48,
    text_layers: int = 3,
    text_hidden: int = 64,
    heads: int = 4,
    key_value_heads: int = 2,
    head_dim: int = 32,
    context: int = 512,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    text_config: dict[str, Any] | None = None,
) -> Path:
    """Writes the directory and returns it. Same arguments, same bytes; torch's global generator is not used.

    One view of (image_size / patch_size)² tokens and a CLS. `tied` leaves the output matrix out, as the
    embedded model does. `text_config` overrides fields of the Llama config.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": WORDS,
                "hidden_size": text_hidden,
                "intermediate_size": 2 * text_hidden,
                "num_hidden_layers": text_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": key_value_heads,
                "head_dim": head_dim,
                "max_position_embeddings": context,
                "bos_token_id": 1,
                "eos_token_id": 3,
                "pad_token_id": 0,
                "tie_word_embeddings": tied,
                **(text_config or {}),
            }
        ),
        image_token_index=4,
        image_seq_length=(image_size // patch_size) ** 2,
        tie_word_embeddings=tied,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = LlavaForConditionalGeneration(config).state_dict()
    _save_weights(path, {name: tuple(each.shape) for name, each in shapes.items()}, seed, layout, tied, dtype)
    _save_text_files(path, image_size, patch_size)
    return path


def _save_weights(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    seed: int,
    layout: Layout,
    tied: bool,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for name in sorted(shapes):
        if tied and name == "lm_head.weight":
            continue
        shape = shapes[name]
        if len(shape) == 1:  # norms and biases
            base = 1.0 if re.search(r"norm\w*\.weight$", name) else 0.0
            tensor = base + 0.05 * torch.randn(shape, generator=generator)
        elif "embed" in name and "patch" not in name:
            tensor = 0.3 * torch.randn(shape, generator=generator)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            tensor = 1.5 * torch.randn(shape, generator=generator) / fan_in**0.5
        key = name
        for pattern, replacement in _RENAMES[layout]:
            key = re.sub(pattern, replacement, key)
        stored[key] = tensor.to(dtype).contiguous()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})


def _save_text_files(path: Path, image_size: int, patch_size: int) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EMBEDDED_MODEL / name, path / name)
    size = {"height": image_size, "width": image_size}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.45, 0.45, 0.45],
        "image_std": [0.27, 0.27, 0.27],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    generation = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    for name, content in (
        ("preprocessor_config.json", image_processor),
        ("processor_config.json", processor),
        ("generation_config.json", generation),
    ):
        (path / name).write_text(json.dumps(content, indent=2), "utf-8")
