"""The question as a vector: equal to CLIP's own, whole when it is long; nothing else of CLIP is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPModel

from hiprune.checkpoints import CheckpointError, digest_of_all
from services.pruner.text import LanguageSpace, PairedTextEncoder
from tests.stacks import questions

ASKED = [sample["question"] for sample in questions()[:12]]


@pytest.fixture(scope="module")
def clip(model: Path) -> Path:
    return model.parent / "clip"


@pytest.fixture(scope="module")
def encoder(clip: Path) -> PairedTextEncoder:
    return PairedTextEncoder(clip)


@pytest.fixture(scope="module")
def reference(clip: Path):
    """transformers' whole CLIP, over ids that the tokenizer gives with its BOS and EOS."""
    whole = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(clip / "tokenizer.json"))

    @torch.inference_mode()
    def features(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer.encode(text).ids])
        found = whole.get_text_features(input_ids=ids)
        pooled = found if isinstance(found, torch.Tensor) else found.pooler_output
        return torch.nn.functional.normalize(pooled[0], dim=0)

    return features


def edited(clip: Path, folder: Path, **text_config: object) -> Path:
    """A copy of the CLIP directory with another text_config."""
    shutil.copytree(clip, folder)
    config = json.loads((clip / "config.json").read_text())
    config["text_config"] |= text_config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("question", [*ASKED, "red"])
def test_a_short_question_is_what_clip_makes_of_it(question, encoder, reference):
    vector = encoder.encode(question)
    assert vector.dtype == torch.float32
    assert vector.shape == (128,)
    torch.testing.assert_close(vector, reference(question), atol=1e-6, rtol=1e-5)


def test_different_questions_are_different_vectors(encoder):
    vectors = torch.stack([encoder.encode(question) for question in sorted(set(ASKED))])
    close = vectors @ vectors.T - torch.eye(len(vectors))
    assert float(close.max()) < 0.9999
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_a_question_longer_than_the_positions_is_read_to_its_end(encoder, reference):
    long = "what color is the circle " * 50  # 77 positions, 75 tokens a chunk
    red, blue = encoder.encode(long + "red"), encoder.encode(long + "blue")
    assert float((red - blue).norm()) > 1e-3
    torch.testing.assert_close(red.norm(), torch.tensor(1.0))


def test_a_question_that_nobody_wants_any_more_is_read_no_further(encoder):
    chunks = encoder.split("what color is the circle " * 50)
    wanted = [True] * 2 + [False] * len(chunks)
    assert encoder.embed(chunks, lambda: wanted.pop(0)) is None
    assert len(wanted) == len(chunks) - 1


def test_a_long_question_is_the_mean_of_chunks_with_their_own_bos_and_eos(encoder, reference):
    chunk = "red " * 75
    torch.testing.assert_close(encoder.encode(chunk), reference(chunk), atol=1e-6, rtol=1e-5)
    mean = torch.nn.functional.normalize((reference(chunk) + reference("blue")) / 2, dim=0)
    torch.testing.assert_close(encoder.encode(chunk + "blue"), mean, atol=1e-6, rtol=1e-5)


def test_no_words_are_no_vector(encoder):
    for question in ("", " ", "\n\t "):
        assert encoder.encode(question) is None


def test_any_text_is_a_finite_vector(encoder):
    for question in ("漢字", "😀", "\0", "a" * 5000, "</s>", "<s><pad><image>", "\u202eabc"):
        assert bool(torch.isfinite(encoder.encode(question)).all()), question


def test_the_spelling_of_a_special_token_does_not_end_the_question(encoder):
    """Pooled at the first EOS that somebody wrote, all behind it would count for nothing."""
    red, blue = encoder.encode("the </s> circle is red"), encoder.encode("the </s> circle is blue")
    assert float((red - blue).norm()) > 1e-3


@pytest.mark.parametrize(("bos", "eos"), [(0, 2), (49406, 49407), (3, 1)])
def test_the_tokenizer_says_where_a_text_begins_and_ends_and_not_the_config(
    bos, eos, clip, tmp_path, reference
):
    """OpenAI's CLIP configs say BOS 0 and EOS 2; the tokens are 49406 and 49407."""
    path = edited(clip, tmp_path / "clip", bos_token_id=bos, eos_token_id=eos)
    encoder = PairedTextEncoder(path)
    for question in ASKED[:4]:
        torch.testing.assert_close(encoder.encode(question), reference(question), atol=1e-6, rtol=1e-5)


def test_a_stale_projection_width_in_the_text_config_does_no_harm(clip, tmp_path, reference):
    encoder = PairedTextEncoder(edited(clip, tmp_path / "clip", projection_dim=512))
    torch.testing.assert_close(encoder.encode("red"), reference("red"), atol=1e-6, rtol=1e-5)


def test_only_the_text_side_is_loaded_in_float32_without_gradients(encoder, clip):
    stored = load_file(clip / "model.safetensors")
    loaded = dict(encoder._model.named_parameters())
    expected = {name for name in stored if name.startswith("text_") and not name.endswith("position_ids")}
    assert set(loaded) == expected
    for name, parameter in loaded.items():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        torch.testing.assert_close(parameter, stored[name].float(), atol=0, rtol=0)


def test_it_is_named_by_its_directory_and_known_by_its_bytes(encoder, clip):
    assert encoder.name == "clip"
    assert encoder.digest == digest_of_all(clip)


# --- damage ---------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        PairedTextEncoder(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_directory_that_is_no_clip_is_refused_by_what_is_wrong(clip, tmp_path):
    path = edited(clip, tmp_path / "clip")
    config = json.loads((path / "config.json").read_text())
    for key in ("text_config", "projection_dim"):
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        assert key in refusal(path)
    (path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    assert "model_type is 'siglip', expected 'clip'" in refusal(path)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{ not a tokenizer")
    assert "tokenizer.json" in refusal(path)
    (path / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(path)


def test_a_tokenizer_that_adds_no_bos_and_eos_is_refused(clip, tmp_path):
    path = edited(clip, tmp_path / "clip")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert "expected BOS and EOS" in refusal(path)


def test_a_checkpoint_without_all_its_text_weights_is_refused(clip, tmp_path):
    path = edited(clip, tmp_path / "clip")
    tensors = load_file(path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert "missing keys: text_projection.weight" in refusal(path)
    tensors["text_projection.weight"] = torch.zeros(7, 128)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert "text encoder" in refusal(path)


def test_a_question_of_no_token_in_the_language_models_table_has_no_vector(model, tmp_path):
    save_file({"table": torch.ones(2, 4)}, tmp_path / "model.safetensors")
    space = LanguageSpace.__new__(LanguageSpace)
    space._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    space._file, space._key, space._rows = tmp_path / "model.safetensors", "table", 2
    assert space._tokenizer.encode("count the shapes .").ids
    assert space.encode("count the shapes .") is None
    assert space.encode("") is None
