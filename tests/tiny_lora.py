"""A LoRA adapter of random matrices, as PEFT writes one, and a model that it is merged into."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from hiprune.language_part import language_name

EVERY_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_lora(
    path: Path,
    model: Path,
    seed: int = 0,
    *,
    rank: int = 4,
    alpha: int = 8,
    modules: Sequence[str] = EVERY_LINEAR,
    prefix: str = "model.language_model.",
) -> Path:
    """Writes the directory and returns it. `prefix` stands before `layers…`: the model's that was trained."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for stored, weight in sorted(load_file(model / "model.safetensors").items()):
        name = language_name(stored) or ""
        if not name.startswith("model.layers.") or name.split(".")[-2] not in modules or weight.ndim != 2:
            continue
        outputs, inputs = weight.shape
        module = f"base_model.model.{prefix}{name.removeprefix('model.').removesuffix('.weight')}"
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        up = torch.randn(outputs, rank, generator=generator) / rank**0.5
        matrices |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    write_adapter(path, matrices, r=rank, lora_alpha=alpha, target_modules=list(modules))
    return path


def write_adapter(path: Path, matrices: dict[str, torch.Tensor], **config: Any) -> Path:
    """The two files of a directory, and it."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(matrices, path / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    (path / "adapter_config.json").write_text(json.dumps(content), "utf-8")
    return path


@torch.no_grad()
def merge(model: torch.nn.Module, adapter: Path) -> None:
    """Adds `alpha / r · B·A` to each weight that the adapter has matrices for."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    matrices = load_file(adapter / "adapter_model.safetensors")
    weights = {language_name(name) or name: weight for name, weight in model.named_parameters()}
    for name, down in matrices.items():
        if name.endswith(".lora_A.weight"):
            up = matrices[name.replace(".lora_A.", ".lora_B.")]
            stored = re.sub(r"^base_model\.model\.|\.lora_A", "", name)
            weights[language_name(stored) or ""] += config["lora_alpha"] / config["r"] * up @ down
