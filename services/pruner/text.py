"""The question as a vector, by a text encoder paired with the tower or in the language model's space.

Source: HiPrune++ (paper, section 3.3). Knows no image and no budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from hiprune.checkpoints import (
    Checkpoint,
    CheckpointError,
    digest_of_all,
    name_of,
    read_json,
    text_digest,
    text_embeddings,
)
from hiprune.loading import load_part

Chunks: TypeAlias = Sequence[Sequence[int]]
"""A question's tokens, cut to what one forward reads. None of them is empty."""


class TextEncoder(Protocol):
    """Turns a question into a vector, in two steps: how long the second takes is known after the first."""

    name: str
    digest: str
    """SHA-256 (hex) of what the vectors depend on: `hiprune.checkpoints.text_digest`."""

    def split(self, question: str) -> Chunks:
        """The question in chunks, each as costly as another; none when it has no token."""

    def embed(self, chunks: Chunks, is_wanted: Callable[[], bool] = lambda: True) -> torch.Tensor | None:
        """The vector (A,) float32 of a question's chunks; None of none, and once it is not wanted any more.

        Not for concurrent use by several threads.
        """


class PairedTextEncoder:
    """CLIP's text side alone, on the CPU in float32."""

    def __init__(self, path: Path) -> None:
        """Loads `text_model` and `text_projection` of a CLIP directory. Raises CheckpointError."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        config = read_json(path / "config.json")
        if config.get("model_type") != "clip":
            raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}, expected 'clip'")
        self.name = name_of(path)
        self.digest = digest_of_all(path)
        try:
            # the projection's width stands at the top of a CLIP config; in text_config it may be a default
            own = config["text_config"] | {"projection_dim": config["projection_dim"]}
        except KeyError as error:
            raise CheckpointError(f"{path}: config.json has no {error}") from error
        text_config = CLIPTextConfig(**own)
        self._model = load_part(
            CLIPTextModelWithProjection, path, part="text encoder", config=text_config, dtype=torch.float32
        )
        self._tokenizer = _tokenizer_of(path)
        # the tokenizer's own: OpenAI's CLIP configs name other tokens, 0 and 2 for 49406 and 49407
        special = self._tokenizer.encode("").ids
        if len(special) != 2:
            raise CheckpointError(f"{path}: tokenizer.json adds {len(special)} tokens, expected BOS and EOS")
        self._begin, self._end = special
        # 75 for CLIP: its 77 positions less BOS and EOS
        self._chunk = text_config.max_position_embeddings - 2

    def encode(self, question: str) -> torch.Tensor | None:
        """The question's vector (A,) float32, L2-normalised; None when it has no token."""
        return self.embed(self.split(question))

    def split(self, question: str) -> Chunks:
        """As many tokens a chunk as the encoder has positions for, less BOS and EOS."""
        ids = self._tokenizer.encode(question, add_special_tokens=False).ids
        return [ids[start : start + self._chunk] for start in range(0, len(ids), self._chunk)]

    @torch.inference_mode()
    def embed(self, chunks: Chunks, is_wanted: Callable[[], bool] = lambda: True) -> torch.Tensor | None:
        """The question's vector (A,) float32, L2-normalised; see `TextEncoder`.

        Each chunk has a BOS and EOS of its own, and their normalised vectors are averaged: a padded split
        would pool the wrong token and ignore the question.
        """
        vectors = []  # C × (A,)
        for chunk in chunks:
            if not is_wanted():
                return None
            vectors.append(self._embed(chunk))
        return torch.nn.functional.normalize(torch.stack(vectors).mean(dim=0), dim=0) if vectors else None

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        """One chunk's projected, pooled and normalised vector (A,)."""
        tokens = torch.tensor([[self._begin, *ids, self._end]])  # (1, S)
        hidden = self._model(input_ids=tokens).last_hidden_state  # (1, S, D)
        # pooled at EOS, which is last; the model's own pooling looks for the config's EOS
        pooled: torch.Tensor = self._model.text_projection(hidden[0, -1])  # (A,)
        return torch.nn.functional.normalize(pooled, dim=0)


class LanguageSpace:
    """The mean of the language model's input embeddings of the question's tokens.

    For families without a paired text encoder. Reads just those rows of the checkpoint, memory-mapped: the
    table of a large model is gigabytes, a question's rows are kilobytes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Finds the table and the tokenizer. Raises CheckpointError."""
        self.name = f"{checkpoint.name}: input embeddings"
        self.digest = text_digest(checkpoint, None)
        self._tokenizer = _tokenizer_of(checkpoint.path)
        table = text_embeddings(checkpoint)
        self._file, self._key, self._rows = table.path, table.name, table.shape[0]

    def encode(self, question: str) -> torch.Tensor | None:
        """The question's vector (H,) float32; None when it has no token that the table knows."""
        return self.embed(self.split(question))

    def split(self, question: str) -> Chunks:
        """One chunk: rows are looked up, and no model runs."""
        ids = self._tokenizer.encode(question, add_special_tokens=False).ids
        return [ids] if ids else []

    def embed(self, chunks: Chunks, is_wanted: Callable[[], bool] = lambda: True) -> torch.Tensor | None:
        """The question's vector (H,) float32; None when it has no token that the table knows."""
        ids = [token for chunk in chunks for token in chunk]
        with safe_open(self._file, "pt") as file:
            table = file.get_slice(self._key)
            rows = {token: table[token : token + 1][0].float() for token in set(ids) if token < self._rows}
        known = [rows[token] for token in ids if token in rows]
        return torch.stack(known).mean(dim=0) if known else None  # (H,)


def _tokenizer_of(path: Path) -> Tokenizer:
    """A checkpoint's tokenizer, to which all of a question is words, the spelling of special tokens too.

    Raises CheckpointError.
    """
    file = path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library knows no other kind
        raise CheckpointError(f"{file}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
