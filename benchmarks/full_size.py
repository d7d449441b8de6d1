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
from pathlib import Path
from typing import Any, Final

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import checkpoints, report
from hiprune.client import Client
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import SERVICES, Stack
from hiprune.v1 import llm_service_pb2, pruner_service_pb2

CLAIM: Final = "a checkpoint of Qwen2.5-VL-3B's size loads, each service its own part, and answers"
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


def write_checkpoint(path: Path) -> None:
    """A complete directory of random bf16 weights, in shards."""
    checkpoints.write_qwen2_5_vl(path, checkpoints.qwen2_5_vl_3b())
    _write_text_files(path)


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
                    "encoder_ms": report.stage_ms(entry.timings),
                    "llm_ms": report.stage_ms(answer.completion.timings),
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
        write_checkpoint(folder)
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
