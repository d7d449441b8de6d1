"""Complete LLaVA-NeXT and LLaVA-OneVision models of random weights, with tiles of 4×4 tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from hiprune.config import EMBEDDED_MODEL
from tests.tiny import WORDS, Layout, _save_weights

TILE: Final = 32
PATCH: Final = 8
SIDE: Final = TILE // PATCH
NEXT_PINPOINTS: Final = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
"""LLaVA-NeXT's own, for tiles of 32 pixels."""
ONEVISION_PINPOINTS: Final = [[32 * rows, 32 * columns] for rows in range(1, 5) for columns in range(1, 5)]
ONEVISION_MAX_TILES: Final = 4
"""Of 16: the largest images are shrunk, as beyond 9 of 36 tiles in the real model."""

_TEXT: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
_VISION: Final = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}
_PIXELS: Final = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": True,
    "image_mean": [0.45, 0.45, 0.45],
    "image_std": [0.27, 0.27, 0.27],
}


def make_llava_next(
    path: Path, seed: int = 0, *, layout: Layout = "vision_model", text: Any = LlamaConfig, **fields: Any
) -> Path:
    """Writes a LLaVA-NeXT directory and returns it. Same arguments, same bytes.

    CLIP of 4 layers, features from the third; a language model of 3 layers, whose config is a `text` with
    these `fields` beside its own.
    """
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION, num_hidden_layers=4, hidden_act="gelu"),
        text_config=text(vocab_size=WORDS, tie_word_embeddings=False, **_TEXT, **fields),
        image_token_index=4,
        image_seq_length=SIDE**2,
        image_grid_pinpoints=NEXT_PINPOINTS,
    )
    processor = {
        "processor_class": "LlavaNextProcessor",
        "image_token": "<image>",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    image_processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        **_PIXELS,
        "size": {"shortest_edge": TILE},
        "do_center_crop": True,
        "crop_size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": NEXT_PINPOINTS,
    }
    _save(path, config, LlavaNextForConditionalGeneration, seed, layout, processor, image_processor)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EMBEDDED_MODEL / name, path / name)
    return path


def make_llava_onevision(
    path: Path, seed: int = 0, *, layout: Layout = "vision_model", vision_layers: int = 5, tied: bool = False
) -> Path:
    """Writes a LLaVA-OneVision directory and returns it. Same arguments, same bytes.

    SigLIP without its head, features from its last layer; Qwen2 of 3 layers. `<video>` is added to the words.
    """
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_VISION, num_hidden_layers=vision_layers, vision_use_head=False),
        text_config=Qwen2Config(
            vocab_size=WORDS + 1,
            tie_word_embeddings=tied,
            # its heads have hidden_size / num_attention_heads channels: 32, which vLLM wants at least
            **{key: value for key, value in _TEXT.items() if key != "head_dim"}
            | {"num_attention_heads": 2, "num_key_value_heads": 1},
        ),
        image_token_index=4,
        video_token_index=WORDS,
        image_grid_pinpoints=ONEVISION_PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{ONEVISION_MAX_TILES}",
        tie_word_embeddings=tied,
    )
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": SIDE**2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }
    image_processor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        **_PIXELS,
        "size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": ONEVISION_PINPOINTS,
    }
    _save(
        path, config, LlavaOnevisionForConditionalGeneration, seed, layout, processor, image_processor, tied
    )
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    tokenizer.add_special_tokens(["<video>"])
    tokenizer.save(str(path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EMBEDDED_MODEL / name, path / name)
    return path


def _save(
    path: Path,
    config: Any,
    model_class: Any,
    seed: int,
    layout: Layout,
    processor: dict[str, Any],
    image_processor: dict[str, Any],
    tied: bool = False,
) -> None:
    config.architectures = [model_class.__name__]
    config.dtype = torch.float32
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = model_class(config).state_dict()
    _save_weights(
        path, {name: tuple(each.shape) for name, each in shapes.items()}, seed, layout, tied, torch.float32
    )
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if name.endswith("image_newline"):
            weights[name] *= 20  # as long as other embeddings: a newline too many must change an answer
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    for name, content in (
        ("preprocessor_config.json", image_processor),
        ("processor_config.json", processor),
        ("generation_config.json", generation),
    ):
        (path / name).write_text(json.dumps(content, indent=2), "utf-8")


def make_clip(path: Path, seed: int = 0, **vision: Any) -> Path:
    """Writes a CLIP directory that pairs with the tower of `make_llava_next`, and returns it.

    With `vision`, that differs in these fields of its config.
    """
    config = CLIPConfig(
        text_config={
            "vocab_size": WORDS,
            "hidden_size": 40,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "bos_token_id": 1,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**_VISION, "num_hidden_layers": 4, **vision},
        projection_dim=24,
    )
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = CLIPModel(config).state_dict()
    names = {name: tuple(each.shape) for name, each in shapes.items()}
    _save_weights(path, names, seed, "model", False, torch.float32)
    shutil.copyfile(EMBEDDED_MODEL.parent / "clip" / "tokenizer.json", path / "tokenizer.json")
    return path
