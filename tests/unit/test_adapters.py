"""LoRA adapters: what the operator's list must be, and which adapters are none for an engine of ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hiprune.checkpoints import CheckpointError
from hiprune.config import ConfigError
from hiprune.errors import NotFound
from hiprune.v1 import llm_service_pb2 as pb
from services.llm.engines.adapters import LoraAdapter, read_adapters
from services.llm.process import load
from services.llm.service import LanguageModelServicer
from services.llm.settings import Settings
from tests.tiny import make_llava
from tests.tiny_lora import make_lora, write_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llava(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_an_adapter_of_the_language_models_layers_is_read_in_any_layout(tmp_path, model, prefix):
    path = make_lora(tmp_path / "a", model, rank=6, prefix=prefix)
    other = make_lora(tmp_path / "b", model, modules=("q_proj",), prefix=prefix)
    assert read_adapters(f"first={path}, second={other},", "model") == (
        LoraAdapter("first", path, 6),
        LoraAdapter("second", other, 4),
    )
    assert read_adapters("", "model") == ()


def test_its_rank_is_the_largest_that_a_pattern_gives(tmp_path):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    path = write_adapter(tmp_path, {name: torch.zeros(9, 2)}, rank_pattern={"up_proj": 9})
    assert read_adapters(f"a={path}", "model")[0].rank == 9


@pytest.mark.parametrize("text", ["a", "=x", "a=", "a b=x", "a==x", "ä=x", "a" * 201 + "=x"])
def test_what_is_no_list_of_names_and_directories_is_refused(text):
    with pytest.raises(ConfigError, match=r"lora_adapters .*expected NAME=DIR"):
        read_adapters(text, "model")


@pytest.mark.parametrize("names", [("model",), ("a", "a")], ids=["the model's", "twice"])
def test_a_name_that_names_two_things_is_refused(tmp_path, model, names):
    path = make_lora(tmp_path, model, modules=("q_proj",))
    with pytest.raises(ConfigError, match="names two things"):
        read_adapters(",".join(f"{name}={path}" for name in names), "model")


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {f"{LAYER}.lora_A.weight": torch.zeros(4, 2)}


@pytest.mark.parametrize(
    ("matrices", "config", "said"),
    [
        (GOOD, {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        (GOOD, {"target_modules": ["model.lm_head"]}, "lm_head"),
        (GOOD, {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        (GOOD, {"modules_to_save": ["multi_modal_projector"]}, "modules_to_save"),
        (GOOD, {"peft_type": "IA3"}, "IA3"),
        (GOOD, {"r": 0}, "r is 0"),
        ({}, {}, "no tensor"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(1)}, {}, "embed_tokens"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(1)}, {}, "lm_head"),
        (
            {"base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)},
            {},
            "vision_tower",
        ),
        (
            {"base_model.model.model.multi_modal_projector.linear_1.lora_B.weight": torch.zeros(1)},
            {},
            "multi_modal_projector",
        ),
        ({f"{LAYER}.lora_magnitude_vector": torch.zeros(1)}, {}, "lora_magnitude_vector"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_that_changes_more_than_the_layers_is_refused_by_what_it_changes(
    tmp_path, matrices, config, said
):
    path = write_adapter(tmp_path, matrices, **config)
    with pytest.raises(CheckpointError, match=said):
        read_adapters(f"a={path}", "model")


def test_a_directory_without_an_adapter_or_with_a_pickle_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config"):
        read_adapters(f"a={tmp_path}", "model")
    write_adapter(tmp_path, GOOD)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        read_adapters(f"a={tmp_path}", "model")


@pytest.mark.parametrize("engine", ["transformers", "vllm-http"])
def test_engines_that_take_no_adapters_say_so(model, engine):
    with pytest.raises(ConfigError, match=f"engine {engine} does not take"):
        load(Settings.read(["--model", str(model), "--engine", engine, "--lora-adapters", "a=b"], {}))


async def test_a_request_names_the_model_or_an_adapter_and_is_told_what_there_is(model):
    served = load(Settings.read(["--model", str(model), "--model-name", "base"], {}))
    served = dataclasses.replace(served, adapters=("one", "two"))
    words = [pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="hello")])]

    def read(name: str) -> str:
        return served.read(words, pb.Sampling(), name, media="media").adapter

    assert [read(name) for name in ("", "base", "one", "two")] == ["", "", "one", "two"]
    with pytest.raises(NotFound, match="'three', this service has 'base', 'one', 'two'"):
        read("three")
    described = await LanguageModelServicer(lambda: served).GetLanguageModel(
        pb.GetLanguageModelRequest(), None
    )
    assert (described.model, list(described.adapters)) == ("base", ["one", "two"])
