"""The language model of a checkpoint as one of its own: the same numbers, and no more bytes than it takes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration
from typer.testing import CliRunner

from hiprune import cli
from hiprune.checkpoints import CheckpointError
from hiprune.lm_export import export_language_model
from tests.tiny import LAYOUTS, make_llava
from tests.tiny_anyres import make_llava_onevision
from tests.tiny_qwen import make_qwen2_5_vl

IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_models_language_part_in_every_layout(tmp_path, layout, tied):
    source = make_llava(tmp_path / "vlm", layout=layout, tied=tied)
    done = []
    made = export_language_model(source, tmp_path / "lm", lambda now, total: done.append((now, total)))
    whole = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    alone, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "lm", dtype=torch.float32, output_loading_info=True
    )
    assert torch.equal(logits(alone.eval()), logits(whole))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert done[-1] == (made.copied_bytes, made.copied_bytes)
    assert made.linked_files == 0
    vision = (source / "model.safetensors").stat().st_size - made.copied_bytes
    assert vision > 0  # it stayed where it was
    assert (tmp_path / "lm" / "tokenizer.json").exists()


def test_a_file_that_fits_as_it_is_is_linked_and_not_copied(tmp_path):
    source = make_llava(tmp_path / "vlm", layout="flat")
    stored = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    language = {
        name.removeprefix("language_model."): each
        for name, each in stored.items()
        if name.startswith("language_model.")
    }
    rest = {name: each for name, each in stored.items() if not name.startswith("language_model.")}
    files = {"a.safetensors": language, "b.safetensors": rest}
    for name, tensors in files.items():
        save_file(tensors, source / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made = export_language_model(source, tmp_path / "lm")
    assert (made.copied_bytes, made.linked_files, made.tensors) == (0, 1, len(language))
    assert (tmp_path / "lm" / "model.safetensors").is_symlink()
    AutoModelForCausalLM.from_pretrained(tmp_path / "lm")


def test_qwen2_of_onevision_is_one_too(tmp_path):
    export_language_model(make_llava_onevision(tmp_path / "vlm"), tmp_path / "lm")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "lm")).__name__ == "Qwen2ForCausalLM"


def test_positions_of_three_axes_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(CheckpointError, match="use the engine vllm, which needs no export"):
        export_language_model(make_qwen2_5_vl(tmp_path / "vlm"), tmp_path / "lm")
    assert not (tmp_path / "lm").exists()


def test_what_is_there_is_not_written_over(tmp_path):
    source = make_llava(tmp_path / "vlm")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export_language_model(source, tmp_path / "lm")


def test_the_command_says_what_it_made_and_why_it_did_not(tmp_path):
    source = make_llava(tmp_path / "vlm")
    made = CliRunner().invoke(cli.app, ["export-lm", str(source), str(tmp_path / "lm")])
    assert made.exit_code == 0
    assert "MB copied" in made.stdout
    again = CliRunner().invoke(cli.app, ["export-lm", str(source), str(tmp_path / "lm")])
    assert again.exit_code == 1
    assert "not empty" in again.stderr
