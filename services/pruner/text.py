"""The question as a vector, by a text encoder paired with the tower or in the language model's space.

Source: HiPrune++ (paper, section 3.3). Knows no image and no budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from hiprune.checkpoints import (
    Checkpoint,
    CheckpointError,
    digest_of_all,
    read_json,
    text_digest,
    text_embeddings,
)
from hiprune.loading import load_part


class TextEncoder(Protocol):
    """Turns a question into a vector. Not for concurrent use by several threads."""

    name: str
    digest: str
    """SHA-256 (hex) of what the vectors depend on: `hiprune.checkpoints.text_digest`."""

    def encode(self, question: str) -> torch.Tensor | None:
        """The question's vector (A,) float32; None when it has no token."""


class PairedTextEncoder:
    """CLIP's text side alone, on the CPU in float32."""

    def __init__(self, path: Path) -> None:
        """Loads `text_model` and `text_projection` of a CLIP directory. Raises CheckpointError."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        config = read_json(path / "config.json")
        if config.get("model_type") != "clip":
            raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}, expected 'clip'")
        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(f"{path}: no tokenizer.json")
        self.name = path.name
        self.digest = digest_of_all(path)
        # the projection's width stands at the top of a CLIP config; in text_config it may be a stale default
        text_config = CLIPTextConfig(**config["text_config"] | {"projection_dim": config["projection_dim"]})
        self._model = load_part(
            CLIPTextModelWithProjection, path, part="text encoder", config=text_config, dtype=torch.float32
        )
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._begin, self._end = text_config.bos_token_id, text_config.eos_token_id
        # 75 for CLIP: its 77 positions less BOS and EOS
        self._chunk = text_config.max_position_embeddings - 2

    @torch.inference_mode()
    def encode(self, question: str) -> torch.Tensor | None:
        """The question's vector (A,) float32, L2-normalised; None when it has no token.

        A question longer than the encoder's positions is cut into chunks with a BOS and EOS of their own,
        whose normalised vectors are averaged: a padded split would pool the wrong token and ignore it.
        """
        ids = self._tokenizer.encode(question, add_special_tokens=False).ids
        if not ids:
            return None
        chunks = [ids[start : start + self._chunk] for start in range(0, len(ids), self._chunk)]
        vectors = [self._embed(chunk) for chunk in chunks]  # C × (A,)
        return torch.nn.functional.normalize(torch.stack(vectors).mean(dim=0), dim=0)

    def _embed(self, ids: list[int]) -> torch.Tensor:
        """One chunk's projected, pooled and normalised vector (A,)."""
        tokens = torch.tensor([[self._begin, *ids, self._end]])  # (1, S)
        pooled: torch.Tensor = self._model(input_ids=tokens).text_embeds  # (1, A)
        return torch.nn.functional.normalize(pooled[0], dim=0)


class LanguageSpace:
    """The mean of the language model's input embeddings of the question's tokens.

    For families without a paired text encoder. Reads just those rows of the checkpoint, memory-mapped: the
    table of a large model is gigabytes, a question's rows are kilobytes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Finds the table and the tokenizer. Raises CheckpointError."""
        path = checkpoint.path
        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(f"{path}: no tokenizer.json")
        self.name = f"{checkpoint.name}: input embeddings"
        self.digest = text_digest(checkpoint, None)
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        table = text_embeddings(checkpoint)
        self._file, self._key, self._rows = table.path, table.name, table.shape[0]

    def encode(self, question: str) -> torch.Tensor | None:
        """The question's vector (H,) float32; None when it has no token."""
        ids = self._tokenizer.encode(question, add_special_tokens=False).ids
        if not ids:
            return None
        with safe_open(self._file, "pt") as file:
            table = file.get_slice(self._key)
            rows = {token: table[token : token + 1][0].float() for token in set(ids) if token < self._rows}
        return torch.stack([rows[token] for token in ids if token in rows]).mean(dim=0)  # (H,)
