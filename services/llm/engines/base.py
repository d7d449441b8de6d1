"""What every engine does: embeddings in, tokens out, one at a time. Knows no text, no media and no wire."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch

from services.llm.families import SplicedPrompt
from services.llm.sampling import Sampling

POSITIONS_END: Final = 2**31
"""Where positions end for an engine that takes whatever fits its context, or computes with any."""


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to generate."""

    prompt: SplicedPrompt
    """The whole prompt."""
    token_ids: Sequence[int]
    """Tokens in it, placeholders included, for penalties that the model's own settings put on repetition."""
    sampling: Sampling
    max_tokens: int
    """Most tokens of the answer; with the prompt no more than the model's context."""
    owner: str = ""
    """Whose request it is: what one owner's prompt leaves in an engine's caches, no other's job finds."""
    adapter: str = ""
    """Name of the LoRA adapter that answers, of those the engine was made with; empty: the model as it is."""


class Step(NamedTuple):
    """One token of an answer."""

    token: int
    cached: int = 0
    """Tokens of the prompt whose keys and values the engine had already."""


class Engine(Protocol):
    """A language model that is loaded between `start` and `stop`."""

    name: str
    """As the setting `engine` has it."""
    context_length: int
    """Longest prompt and answer together, in tokens."""
    positions_end: int
    """Positions of a prompt and its answer are below this: they may be further apart than tokens are."""
    end_tokens: frozenset[int]
    """Tokens that end the model's turn."""

    async def start(self) -> None:
        """Loads the weights and generates once. Raises CheckpointError."""

    async def stop(self) -> None:
        """Ends every generation at its next token and frees the model."""

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings of tokens, (T, H). Blocks: call it off the event loop."""

    def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        """Tokens of the answer as they come: at most `max_tokens`, an end token last if there is one.

        The stages `prefill` and `decode` go to the request's clock. Closing the iterator ends the work at
        the next token, or before the prefill where that has not begun, and returns when it has ended.
        """
