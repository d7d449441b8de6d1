"""Published checkpoints' shapes by name: the fields of their `config.json` that decide what they cost.

Source: config.json of these repositories on the Hugging Face hub, as of transformers 5.19 (what a file
leaves out is transformers' default and stands here):

- llava-1.5-7b: llava-hf/llava-1.5-7b-hf                      - llava-1.5-13b: llava-hf/llava-1.5-13b-hf
- llava-next-7b: llava-hf/llava-v1.6-vicuna-7b-hf
- qwen2.5-vl-3b, -7b: Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct
- video-llava-7b: LanguageBind/Video-LLaVA-7B-hf
- llava-onevision-0.5b, -7b: llava-hf/llava-onevision-qwen2-0.5b-ov-hf and -7b-ov-hf
- CLIP_L_336: openai/clip-vit-large-patch14-336
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_CLIP_VISION: Final[Mapping[str, Any]] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP_VISION: Final[Mapping[str, Any]] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_QWEN_VISION: Final[Mapping[str, Any]] = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_VICUNA_7B: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
_VICUNA_13B: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32064,
}
_QWEN2_0_5B: Final[Mapping[str, Any]] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152000,
    "tie_word_embeddings": True,
}
_QWEN2_7B: Final[Mapping[str, Any]] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152128,
}

CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llava-1.5-7b": {"model_type": "llava", "vision_config": _CLIP_VISION, "text_config": _VICUNA_7B},
    "llava-1.5-13b": {"model_type": "llava", "vision_config": _CLIP_VISION, "text_config": _VICUNA_13B},
    "llava-next-7b": {
        "model_type": "llava_next",
        "vision_config": _CLIP_VISION,
        "text_config": _VICUNA_7B,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 2048},
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 3584},
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "video-llava-7b": {
        "model_type": "video_llava",
        "vision_config": {**_CLIP_VISION, "image_size": 224},
        "text_config": _VICUNA_7B,
    },
    "llava-onevision-0.5b": {
        "model_type": "llava_onevision",
        "vision_config": _SIGLIP_VISION,
        "text_config": _QWEN2_0_5B,
        "vision_aspect_ratio": "anyres_max_9",
        "tie_word_embeddings": True,
    },
    "llava-onevision-7b": {
        "model_type": "llava_onevision",
        "vision_config": _SIGLIP_VISION,
        "text_config": _QWEN2_7B,
        "vision_aspect_ratio": "anyres_max_9",
    },
}

CLIP_L_336: Final[Mapping[str, Any]] = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
}
"""The text encoder that is paired with LLaVA's tower."""
