"""What every engine does: embeddings in, tokens out, one at a time. Knows no text, no media and no wire."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import torch

from services.llm.sampling import Sampling


class Engine(Protocol):
    """A language model that is loaded between `start` and `stop`."""

    name: str
    """As the setting `engine` has it."""
    context_length: int
    """Longest prompt and answer together, in tokens."""
    end_tokens: frozenset[int]
    """Tokens that end the model's turn."""

    async def start(self) -> None:
        """Loads the weights and generates once. Raises CheckpointError."""

    async def stop(self) -> None:
        """Ends every generation at its next token and frees the model."""

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings of tokens, (T, H). Blocks: call it off the event loop."""

    def generate(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        sampling: Sampling,
        max_tokens: int,
        prompt_ids: Sequence[int] = (),
    ) -> AsyncGenerator[int, None]:
        """Tokens of the answer as they come: at most `max_tokens`, an end token last if there is one.

        `embeddings` (S, H) and `positions`, (S,) or (axes, S), are the whole prompt; `prompt_ids` are the
        tokens in it, for penalties that the model's own settings put on repetition. The stages `prefill`
        and `decode` go to the request's clock. Closing the iterator ends the work at the next token, or
        before the prefill where that has not begun, and returns when it has ended.
        """
