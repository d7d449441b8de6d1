"""Checkpoints: an identity that holds across layouts and changes with every byte, and damage named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hiprune.checkpoints import (
    CheckpointError,
    digest_of_all,
    locate,
    locate_paired,
    name_of,
    open_checkpoint,
    read_json,
    require_complete,
    stored_tensors,
)

CONFIG = {
    "model_type": "llava",
    "vision_config": {"num_hidden_layers": 8, "image_size": 112, "patch_size": 8, "hidden_size": 16},
    "vision_feature_layer": -2,
}
PREPROCESSING = {"size": {"shortest_edge": 112}, "image_mean": [0.5, 0.5, 0.5], "do_resize": True}
LAYOUTS = (
    "vision_tower.",
    "vision_tower.vision_model.",
    "model.vision_tower.",
    "model.vision_tower.vision_model.",
)


def tower(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "embeddings.class_embedding": torch.randn(16, generator=draw),
        "encoder.layers.0.mlp.fc1.weight": torch.randn(4, 16, generator=draw).half(),
        "encoder.layers.0.mlp.fc1.bias": torch.randn(4, generator=draw).bfloat16(),
        "pre_layrnorm.weight": torch.randn(16, generator=draw),
    }


def write(
    path: Path,
    vision: dict[str, torch.Tensor],
    layout: str = LAYOUTS[0],
    shards: int = 1,
    config: object = CONFIG,
    language: int = 0,
) -> Path:
    """A LLaVA directory: the vision tensors in a layout and a number of files, some language beside them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    tensors = {layout + name: tensor for name, tensor in vision.items()}
    tensors["language_model.model.norm.weight"] = torch.full((8,), float(language))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(sorted(tensors.items())[number::shards])
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def digest(path: Path) -> str:
    return open_checkpoint(str(path)).vision_digest


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> Path:
    """Where digests are remembered: nowhere that another test or person looks."""
    folder = tmp_path / "memory"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "hiprune" / "digests.json"


@pytest.fixture
def base(tmp_path) -> Path:
    return write(tmp_path / "base", tower())


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_digest_depends_on_neither_the_key_layout_nor_the_sharding(layout, shards, base, tmp_path):
    other = write(tmp_path / "other", tower(), layout, shards)
    assert digest(other) == digest(base)
    assert re.fullmatch("[0-9a-f]{64}", digest(base))


def test_the_digest_is_of_the_tower_alone(base, tmp_path):
    assert digest(write(tmp_path / "other", tower(), language=7)) == digest(base)


def one_byte(tensors):
    tensors["pre_layrnorm.weight"].view(torch.uint8)[5] ^= 1


def another_name(tensors):
    tensors["pre_layrnorm.weight2"] = tensors.pop("pre_layrnorm.weight")


def another_shape(tensors):
    name = "encoder.layers.0.mlp.fc1.weight"
    tensors[name] = tensors[name].reshape(16, 4)


def another_dtype(tensors):
    name = "encoder.layers.0.mlp.fc1.weight"
    tensors[name] = tensors[name].view(torch.bfloat16)


def swapped(tensors):
    one, two = "embeddings.class_embedding", "pre_layrnorm.weight"
    tensors[one], tensors[two] = tensors[two], tensors[one]


def one_fewer(tensors):
    del tensors["encoder.layers.0.mlp.fc1.bias"]


def fine_tuned(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor + 1e-2


@pytest.mark.parametrize(
    "change",
    [one_byte, another_name, another_shape, another_dtype, swapped, one_fewer, fine_tuned],
    ids=lambda change: change.__name__,
)
def test_the_digest_changes_with_anything_of_the_tower(change, base, tmp_path):
    tensors = tower()
    change(tensors)
    assert digest(write(tmp_path / "other", tensors)) != digest(base)


def test_the_hash_of_the_bytes_is_remembered(base, memory):
    first = digest(base)
    content = json.loads(memory.read_text())
    assert len(content) == 1
    memory.write_text(json.dumps(dict.fromkeys(content, "remembered")))
    assert digest(base) != first  # made of what is remembered and of the settings


@pytest.mark.parametrize(
    "change",
    [
        {"vision_feature_layer": -1},
        {"vision_config": {"num_attention_heads": 8}},
        {"vision_config": {"hidden_act": "quick_gelu"}},
    ],
    ids=["feature layer", "heads", "activation"],
)
def test_equal_weights_computed_with_otherwise_are_another_tower(base, change):
    first = digest(base)
    file = base / "config.json"
    config = json.loads(file.read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    assert digest(base) != first


def test_a_file_that_changes_in_place_is_not_remembered_as_it_was(base):
    first = digest(base)
    file = base / "model.safetensors"
    before = file.stat()
    write(base, tower(seed=1))  # same names, shapes and size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -a, tar and layers of images do
    assert file.stat().st_size == before.st_size
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert digest(base) != first


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 1}', "null"])
def test_a_damaged_memory_costs_the_memory_alone(content, base, memory):
    first = digest(base)
    known = json.loads(memory.read_text())
    memory.write_text(content)
    assert digest(base) == first
    memory.write_text(json.dumps(dict.fromkeys(known, 7)))  # not a digest
    assert digest(base) == first


def test_a_read_only_cache_costs_the_memory_alone(base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "base" / "config.json"))  # a file: nothing fits below
    assert digest(base) == digest(base)


def test_an_account_without_a_home_costs_the_memory_alone(base):
    """As in a container that runs under a number alone."""
    expected = digest(base)
    program = (
        "import os, pwd, sys\n"
        "pwd.getpwuid = lambda number: (_ for _ in ()).throw(KeyError(number))\n"
        "from hiprune.checkpoints import open_checkpoint\n"
        "print(open_checkpoint(sys.argv[1]).vision_digest)"
    )
    environ = {key: value for key, value in os.environ.items() if key not in {"HOME", "XDG_CACHE_HOME"}}
    done = subprocess.run(
        [sys.executable, "-c", program, base], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == expected, done.stderr


# --- preprocessing --------------------------------------------------------------------------------


def preprocessing(path: Path, settings: dict, file: str = "preprocessor_config.json") -> str:
    for each in ("preprocessor_config.json", "processor_config.json"):
        (path / each).unlink(missing_ok=True)
    (path / file).write_text(json.dumps(settings))
    return open_checkpoint(str(path)).preprocessing_digest


def test_the_preprocessing_digest_is_of_the_settings_and_not_of_how_they_are_written(base):
    first = preprocessing(base, PREPROCESSING)
    backwards = dict(reversed(PREPROCESSING.items()))
    assert preprocessing(base, backwards) == first
    named = {**PREPROCESSING, "image_processor_type": "CLIPImageProcessorFast", "processor_class": "X"}
    assert preprocessing(base, named) == first
    nested = {"image_processor": named, "processor_class": "LlavaProcessor"}
    assert preprocessing(base, nested, "processor_config.json") == first


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": 336}},
        {"image_mean": [0.5, 0.5, 0.4]},
        {"do_resize": False},
        {"resample": 2},
    ],
    ids=str,
)
def test_the_preprocessing_digest_changes_with_every_setting(change, base):
    assert preprocessing(base, PREPROCESSING | change) != preprocessing(base, PREPROCESSING)


# --- damage ---------------------------------------------------------------------------------------


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    return str(caught.value)


def test_a_language_only_checkpoint_is_refused(tmp_path):
    message = refusal(write(tmp_path / "base", {}))
    assert "no vision tensor" in message
    assert "language-only" in message


@pytest.mark.parametrize("keep", [0, 3, 8, 20, -1])
def test_a_truncated_file_is_refused_by_its_name_and_size(keep, base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(base)
    assert f"{file}: truncated: {file.stat().st_size} bytes" in message


def test_a_header_that_claims_more_than_any_file_holds_is_refused_without_an_allocation(base):
    (base / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + bytes(100))
    assert "its header alone claims 9223372036854775808" in refusal(base)


def with_header(header: object, body: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON",
        b"\xff\xfe",
        [1, 2],
        7,
        None,
        {"vision_tower.x": 7},
        {"vision_tower.x": {}},
        {"vision_tower.x": GOOD | {"data_offsets": [0]}},
        {"vision_tower.x": GOOD | {"data_offsets": [8, 4]}},
        {"vision_tower.x": GOOD | {"data_offsets": [-4, 4]}},
        {"vision_tower.x": GOOD | {"data_offsets": ["a", "b"]}},
        {"vision_tower.x": GOOD | {"shape": None}},
        {"vision_tower.x": {"dtype": "F32", "data_offsets": [0, 16]}},
    ],
    ids=str,
)
def test_what_is_no_safetensors_file_is_refused_by_its_name(header, base):
    file = base / "model.safetensors"
    file.write_bytes(with_header(header))
    assert f"{file}: not a safetensors file" in refusal(base)


def test_pickled_weights_are_refused(base):
    (base / "model.safetensors").unlink()
    torch.save(tower(), base / "pytorch_model.bin")
    assert "pickled weights are not read" in refusal(base)


def test_a_shard_that_is_missing_is_named(tmp_path):
    path = write(tmp_path / "sharded", tower(), shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert f"{shard}: No such file" in refusal(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(index, tmp_path):
    path = write(tmp_path / "sharded", tower(), shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json: no weight_map" in refusal(path)


def test_only_the_files_that_would_be_loaded_are_the_checkpoint(base, tmp_path):
    """transformers takes model.safetensors first, then an index; an adapter beside them is none of it."""
    expected = digest(base)
    save_file({"vision_tower.pre_layrnorm.weight": torch.zeros(16)}, base / "adapter_model.safetensors")
    assert digest(base) == expected
    stale = write(tmp_path / "stale", tower(seed=1), shards=2)
    for file in stale.glob("model*"):
        shutil.copy(file, base)
    assert digest(base) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "model_type is ''"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected one of"),
        ({"model_type": "llava"}, "config.json has no 'vision_config'"),
        ({**CONFIG, "vision_config": {}}, "config.json has no 'num_hidden_layers'"),
        ({**CONFIG, "vision_config": None}, "config.json: "),
        ({**CONFIG, "vision_config": CONFIG["vision_config"] | {"patch_size": 0}}, "config.json: "),
        ({**CONFIG, "vision_config": CONFIG["vision_config"] | {"image_size": "big"}}, "config.json: "),
        ({**CONFIG, "vision_feature_layer": [-2, -5]}, "vision_feature_layer is [-2, -5]"),
        ({**CONFIG, "vision_feature_layer": 9}, "vision_feature_layer is 9"),
        ({**CONFIG, "hiprune": 2}, "hiprune is 2, expected"),
        ({**CONFIG, "hiprune": {"layer": 2}}, "hiprune is {'layer': 2}, expected"),
        ({**CONFIG, "hiprune": {"object_layer": 0}}, "hiprune.object_layer is 0, expected a layer from 1"),
        ({**CONFIG, "hiprune": {"object_layer": 99}}, "hiprune.object_layer is 99, expected a layer from 1"),
        ({**CONFIG, "hiprune": {"object_layer": True}}, "hiprune.object_layer is True, expected"),
        ([], "config.json: a JSON list, expected an object"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused_by_its_key(config, expected, tmp_path):
    message = refusal(write(tmp_path / "base", tower(), config=config))
    assert str(tmp_path / "base") in message
    assert expected in message


def test_a_checkpoint_may_name_its_own_object_layer(tmp_path):
    base = open_checkpoint(str(write(tmp_path / "base", tower())))
    for layer in range(1, base.facts.deep_layer + 1):
        config = {**CONFIG, "hiprune": {"object_layer": layer}}
        own = open_checkpoint(str(write(tmp_path / f"own{layer}", tower(), config=config)))
        assert own.facts == replace(base.facts, object_layer=layer)
        # which layer looks at things is no part of what the tower computes: its cached entries stay good
        assert own.vision_digest == base.vision_digest


def test_a_config_that_is_missing_or_unreadable_is_named(base):
    file = base / "config.json"
    file.write_text("{ not JSON")
    assert f"{file}: not JSON" in refusal(base)
    file.unlink()
    assert f"{file}: No such file" in refusal(base)
    file.mkdir()
    assert f"{file}: Is a directory" in refusal(base)


def test_missing_preprocessing_is_named(base):
    (base / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json: No such file" in refusal(base)


@pytest.mark.parametrize("model", ["", "no such directory", "~nobody-of-this-name/model", "a/b/c", "x" * 300])
def test_a_model_that_is_no_directory_and_no_hub_id_is_named(model):
    with pytest.raises(CheckpointError, match=re.escape(repr(model))):
        locate(model)


# --- names and pairs ------------------------------------------------------------------------------


def test_a_checkpoint_is_called_by_its_directory_and_a_snapshot_by_its_hub_id(tmp_path):
    assert open_checkpoint(str(write(tmp_path / "my-llava", tower()))).name == "my-llava"
    snapshot = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / ("0a1b2c3d" * 5)
    assert open_checkpoint(str(write(snapshot, tower()))).name == "llava-hf/llava-1.5-7b-hf"
    assert name_of(Path("/data/snapshots/monday")) == "monday"


def test_the_paired_model_is_beside_the_model_or_where_the_setting_says(model, tmp_path, monkeypatch):
    embedded = open_checkpoint(str(model))
    assert locate_paired("", embedded) == model.parent / "clip"
    assert locate_paired("none", embedded) is None
    assert locate_paired(str(tmp_path), embedded) == tmp_path
    with pytest.raises(CheckpointError, match="no such directory"):
        locate_paired("no such directory", embedded)


def test_a_familys_paired_model_without_safetensors_is_no_pair(base, tmp_path, monkeypatch, caplog):
    """One that is named must be there; the family's own may be absent, or hold pickled weights alone."""
    pickled = tmp_path / "hub" / "models--openai--clip-vit-large-patch14-336" / "snapshots" / ("ab" * 20)
    pickled.mkdir(parents=True)
    (pickled / "config.json").write_text('{"model_type": "clip"}')
    refs = pickled.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(pickled.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate("openai/clip-vit-large-patch14-336") == pickled
    assert locate_paired("", open_checkpoint(str(base))) is None
    assert "pickled weights are not read" in caplog.text


def test_a_partly_loaded_model_is_refused_by_its_missing_keys(tmp_path):
    require_complete({"missing_keys": [], "unexpected_keys": ["x"]}, part="tower", path=tmp_path)
    missing = {"missing_keys": {"d", "b", "c", "a"}}
    with pytest.raises(CheckpointError, match="tower: missing keys: a, b, c and 1 more"):
        require_complete(missing, part="tower", path=tmp_path)
    with pytest.raises(CheckpointError, match="mismatched keys"):
        require_complete({"mismatched_keys": [("a", (1,), (2,))]}, part="tower", path=tmp_path)


# --- the embedded model ---------------------------------------------------------------------------


def test_the_embedded_model_is_what_its_files_say(model):
    checkpoint = open_checkpoint(str(model))
    assert (checkpoint.name, checkpoint.facts.family) == ("llava", "llava")
    stored = {tensor.name: tensor for tensor in stored_tensors(model)}
    loaded = load_file(model / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in loaded.items()
    }
    assert len(digest_of_all(model.parent / "clip")) == 64
    assert read_json(model / "config.json") == checkpoint.config
