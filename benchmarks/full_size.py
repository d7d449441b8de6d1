"""Claim: a full-size checkpoint loads, each service its own part, and answers.

    python -m benchmarks.full_size [--folder DIR] [--image-side 448]

Writes a random-weight checkpoint of Qwen2.5-VL-3B's size (7 GB in bf16) to a folder, starts the three
services on it, asks one question with every token and with a third of them, and records times and the peak
memory of each process. Random weights say nothing; that they say the same as stock is the tests' claim.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import report
from benchmarks.service_tax import stage_ms
from hiprune.client import Client
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import SERVICES, Stack
from hiprune.v1 import llm_service_pb2, pruner_service_pb2

CLAIM: Final = "a checkpoint of Qwen2.5-VL-3B's size loads, each service its own part, and answers"
SHARD_BYTES: Final = 2 * 2**30
SPECIALS: Final = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config_of_3b() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B's published configuration."""
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
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
        },
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=True,
    )


def write_checkpoint(path: Path, config: Any) -> None:
    """A complete directory of random bf16 weights, in shards."""
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.dtype = torch.bfloat16
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = Qwen2_5_VLForConditionalGeneration(config).state_dict()
    names = [name for name in shapes if name != "lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for number, shard in enumerate(_shards(names, shapes)):
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for name in track(shard, description=f"writing {file}"):
            shape = shapes[name].shape
            if len(shape) == 1:
                tensors[name] = torch.full(shape, 1.0 if "norm" in name else 0.0, dtype=torch.bfloat16)
            else:
                scale = shape[1:].numel() ** -0.5
                tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(
                    0, scale, generator=generator
                )
            where[name] = file
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    _write_text_files(path)


def _shards(names: list[str], shapes: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in names:
        need = shapes[name].numel() * 2
        if shard and size + need > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += need
    yield shard


def _write_text_files(path: Path) -> None:
    """A word-level tokenizer with the real ids of the special tokens, a template, the image settings."""
    words = json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    vocabulary = {word: place for place, word in enumerate(["[unk]", *sorted(words)])}
    vocabulary |= {f"[{number}]": number for number in range(len(vocabulary), 151643)}
    vocabulary |= SPECIALS
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(path / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "[unk]",
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "generation_config.json": {"eos_token_id": 151645, "pad_token_id": 151643},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content), "utf-8")
    (path / "chat_template.jinja").write_text(TEMPLATE, "utf-8")


def peak_mb(pid: int) -> dict[str, float]:
    """Peak resident memory of a process in MB: all of it, and what of now is not the mapped checkpoint."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines())
    return {name: int(fields[key].split()[0]) / 1024 for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))}


async def ask(stack: Stack, image: bytes, tokens: int) -> list[dict[str, Any]]:
    """One question with every token and one with a third of them."""
    rows = []
    async with Client(stack.address, timeout_s=3000) as client:
        for name in ("METHOD_NONE", "METHOD_HIPRUNE"):
            policy = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.Method.Value(name))
            sampling = llm_service_pb2.Sampling(max_tokens=tokens)
            answer = await client.ask(
                "how many shapes are in the image ?", image, policy=policy, sampling=sampling
            )
            entry = answer.report.media[0]
            rows.append(
                {
                    "method": name.removeprefix("METHOD_"),
                    "visual_tokens": [entry.summary.tokens_before, entry.summary.tokens_kept],
                    "prompt_tokens": answer.completion.usage.prompt_tokens,
                    "completion_tokens": answer.completion.usage.completion_tokens,
                    "encoder_ms": stage_ms(entry.timings),
                    "llm_ms": stage_ms(answer.completion.timings),
                    "first_text_s": answer.first_text_s,
                    "total_s": answer.total_s,
                }
            )
    return rows


def main() -> None:
    """Writes, starts, asks and records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is, or goes; default: a temporary one"
    )
    parser.add_argument("--image-side", type=int, default=448)
    parser.add_argument("--max-tokens", type=int, default=8)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hiprune-full-size-"))
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, config_of_3b())
    file = io.BytesIO()
    with Image.open(EMBEDDED_MODEL.parents[1] / "samples" / "scene00.png") as picture:
        picture.convert("RGB").resize((options.image_side, options.image_side)).save(file, "PNG")
    environ = {
        "HIPRUNE_ENCODER_DTYPE": "bfloat16",
        "HIPRUNE_LLM_DTYPE": "bfloat16",
        **{f"HIPRUNE_{service.upper()}_DEFAULT_DEADLINE_MS": "3000000" for service in SERVICES},
    }
    begun = time.perf_counter()
    with Stack(model=str(folder), redis=False, environ=environ, progress=print) as stack:
        ready_s = time.perf_counter() - begun
        answers = asyncio.run(ask(stack, file.getvalue(), options.max_tokens))
        memory = {service: peak_mb(stack.processes[service].pid) for service in SERVICES}
    report.table(
        "Qwen2.5-VL-3B's size, random bf16 weights",
        ("", "peak MB", "own MB"),
        [(service, peaks["peak"], peaks["own"]) for service, peaks in memory.items()],
    )
    settings = {"image_side": options.image_side, "max_tokens": options.max_tokens, "dtype": "bfloat16"}
    results = {"ready_s": ready_s, "memory_mb": memory, "answers": answers}
    print(report.write("full_size_qwen2_5_vl_3b", CLAIM, settings, results))
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
