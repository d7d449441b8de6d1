"""Checkpoints of published sizes and random weights: what benchmarks run on where no weights are at hand.

Complete directories that the services load as they load any other. The weights are stored in bf16, drawn so
that activations keep their size from layer to layer. Random weights cost what trained ones cost; what they
answer means nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

from benchmarks.report import track

EMBEDDED: Final = Path(__file__).resolve().parents[1] / "models" / "shapes" / "checkpoint"
SAMPLES: Final = Path(__file__).resolve().parents[1] / "models" / "shapes" / "samples"
SHARD_BYTES: Final = 2 * 2**30

CLIP_L_336: Final[Mapping[str, Any]] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
"""openai/clip-vit-large-patch14-336, LLaVA-1.5's tower: 576 patches and a CLS."""

CLIP_B_32: Final[Mapping[str, Any]] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "projection_dim": 512,
}
"""openai/clip-vit-base-patch32: 49 patches and a CLS."""

_CLIP_L_TEXT: Final[Mapping[str, Any]] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "bos_token_id": 1,  # of the embedded model's tokenizer, which stands beside it
    "eos_token_id": 3,
    "pad_token_id": 0,
}

_QWEN_VISION: Final[Mapping[str, Any]] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}


def qwen2_0_5b() -> Qwen2Config:
    """Qwen2-0.5B's published configuration, with the embedded model's special tokens."""
    return Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )


def llama_7b() -> LlamaConfig:
    """Vicuna-7B's published configuration, LLaVA-1.5-7B's language model."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )


def llava(vision: Mapping[str, Any], text: Any) -> LlavaConfig:
    """A LLaVA of this tower and this language model, with the embedded model's special tokens."""
    side = vision["image_size"] // vision["patch_size"]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=text,
        image_token_index=4,
        image_seq_length=side * side,
        vision_feature_layer=-2,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def qwen2_5_vl_3b(*, depth: int = 32, text_layers: int = 36) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B's published configuration, or fewer layers of the same width.

    `depth` is a multiple of 8: every eighth block sees the whole image.
    """
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        vision_config={
            **_QWEN_VISION,
            "depth": depth,
            "fullatt_block_indexes": list(range(7, depth, 8)),
        },
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=True,
    )


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder that goes away with what was written to it."""
    folder = Path(tempfile.mkdtemp(prefix="hiprune-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_llava(path: Path, config: LlavaConfig, *, vision_only: bool = False) -> Path:
    """A LLaVA directory, and it. `vision_only` leaves out what the encoder and the pruner never read."""
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        shapes = LlavaForConditionalGeneration(config).state_dict()
    wanted = re.compile("vision_tower" if vision_only else "")
    kept = {name: each.shape for name, each in shapes.items() if wanted.search(name)}
    if config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    _write(path, config, kept)
    _write_llava_files(path, config)
    return path


def write_qwen2_5_vl(path: Path, config: Qwen2_5_VLConfig, *, vision_only: bool = False) -> Path:
    """A Qwen2.5-VL directory without tokenizer and template, and it; see `write_llava`."""
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    with torch.device("meta"):
        shapes = Qwen2_5_VLForConditionalGeneration(config).state_dict()
    wanted = re.compile(r"visual\." if vision_only else "")
    kept = {name: each.shape for name, each in shapes.items() if wanted.search(name)}
    kept.pop("lm_head.weight", None)  # tied
    _write(path, config, kept)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    _write_json(path / "preprocessor_config.json", preprocessor)
    return path


def write_clip(path: Path) -> Path:
    """What pruner and encoder read of CLIP-L/14-336 as a text model: its text side and two projections."""
    config = CLIPConfig(
        text_config=CLIPTextConfig(**_CLIP_L_TEXT).to_dict(),
        vision_config=CLIPVisionConfig(**CLIP_L_336).to_dict(),
        projection_dim=768,
    )
    config.architectures = ["CLIPModel"]
    with torch.device("meta"):
        shapes = CLIPModel(config).state_dict()
    read = re.compile(r"^text_|^visual_projection\.|^vision_model\.post_layernorm\.")
    _write(path, config, {name: each.shape for name, each in shapes.items() if read.search(name)})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "clip" / name, path / name)
    return path


def _write(path: Path, config: Any, shapes: Mapping[str, torch.Size]) -> None:
    """config.json and random bf16 weights of these shapes, in shards."""
    path.mkdir(parents=True, exist_ok=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for number, shard in enumerate(_shards(shapes)):
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for name in track(shard, f"writing {path.name}/{file}"):
            tensors[name] = _random(name, shapes[name], generator)
            where[name] = file
        save_file(tensors, path / file, metadata={"format": "pt"})
    _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def _shards(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        need = shape.numel() * 2
        if shard and size + need > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += need
    yield shard


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape.numel()).view(shape)
    if len(shape) < 2:  # norms and biases
        one = re.search(r"(norm\w*|ln_q)\.weight$", name)
        return torch.full(shape, 1.0 if one else 0.0, dtype=torch.bfloat16)
    # an embedding's rows are looked up, not summed over
    scale = 1.0 if "embed" in name and "patch" not in name else shape[1:].numel() ** -0.5
    # drawn in float32, three times as fast as in bfloat16
    return torch.empty(shape).normal_(0, scale, generator=generator).to(torch.bfloat16)


def _write_llava_files(path: Path, config: LlavaConfig) -> None:
    """The embedded model's tokenizer with a word for every id of the vocabulary, its template, settings."""
    tokenizer = json.loads((EMBEDDED / "llava" / "tokenizer.json").read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"[{number}]": number for number in range(len(words), config.text_config.vocab_size)}
    _write_json(path / "tokenizer.json", tokenizer)
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(EMBEDDED / "llava" / name, path / name)
    side = config.vision_config.image_size
    processor = json.loads((EMBEDDED / "llava" / "processor_config.json").read_text("utf-8"))
    processor["patch_size"] = config.vision_config.patch_size
    processor["image_processor"] |= {
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
    }
    _write_json(path / "processor_config.json", processor)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")
