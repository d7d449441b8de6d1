"""The table of input embeddings that an engine apart has at hand, and what is said where that is missing."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from hiprune.checkpoints import CheckpointError
from hiprune.config import ConfigError
from services.llm.engines.embeddings import EmbeddingTable
from services.llm.placement import Placement
from services.llm.process import load
from services.llm.settings import Settings
from tests.tiny import LAYOUTS, make_llava
from tests.tiny_qwen import make_qwen2_5_vl

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_the_model_in_each_layout(tmp_path, layout):
    path = make_llava(tmp_path, layout=layout)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    table = EmbeddingTable(path, CPU)
    ids = [5, 99, 5, 0]
    assert torch.equal(table.rows(ids), model.get_input_embeddings()(torch.tensor(ids)).detach())
    assert table.width == 64
    assert table.rows([]).shape == (0, 64)
    assert EmbeddingTable(path, Placement(CPU.device, torch.bfloat16)).rows(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["hub", "model"])
def test_a_qwen_has_one_in_either_layout(tmp_path, layout):
    assert EmbeddingTable(make_qwen2_5_vl(tmp_path, layout=layout), CPU).rows([1, 2]).shape == (2, 64)


def test_a_checkpoint_without_one_is_refused(tmp_path):
    make_llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        EmbeddingTable(tmp_path, CPU)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_where_there_is_none_is_refused_by_setting(tmp_path):
    path = make_llava(tmp_path)
    with pytest.raises(ConfigError, match=r"^engine \(--engine\): got 'vllm', which is not installed here"):
        load(Settings.read(["--model", str(path), "--engine", "vllm"], {}))


REMOTE = ["--engine", "vllm-http", "--url", "http://127.0.0.1:9"]


async def test_a_server_that_is_not_there_is_refused_by_setting_and_address(tmp_path):
    model = load(Settings.read(["--model", str(make_llava(tmp_path)), *REMOTE], {}))
    with pytest.raises(ConfigError, match=r"^url \(--url\): no vLLM server .* answers at http://127.0.0.1:9"):
        await model.engine.start()
    await model.engine.stop()


def test_positions_of_three_axes_are_not_for_a_server_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match="use vllm or transformers"):
        load(Settings.read(["--model", str(make_qwen2_5_vl(tmp_path)), *REMOTE], {}))


def test_a_server_elsewhere_needs_an_address(tmp_path):
    with pytest.raises(ConfigError, match=r"^url \(--url\): is empty"):
        load(Settings.read(["--model", str(make_llava(tmp_path)), "--engine", "vllm-http"], {}))
    with pytest.raises(ConfigError, match="url"):
        Settings.read(["--url", "file:///etc/passwd"], {})


def test_what_an_engine_does_not_do_is_refused_at_the_start(tmp_path):
    make_llava(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.3, "eos_token_id": 3}')
    with pytest.raises(
        CheckpointError, match=r"repetition_penalty is 1.3, which the engine vllm-http does not"
    ):
        load(Settings.read(["--model", str(tmp_path), *REMOTE], {}))
