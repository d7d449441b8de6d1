"""The language model on kept tokens: many questions about one picture in one forward, answered greedily.

What the llm service does one question at a time (the same prompt, projector, positions and weights), for
as many questions as share their kept tokens: each sees the picture's tokens and itself, and none another. A
test holds its answers to the service's, token for token. Knows no method, no encoder and no truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch.nn.utils.rnn import pad_sequence

from hiprune.checkpoints import Checkpoint
from hiprune.loading import load_part
from hiprune.v1 import encoder_service_pb2
from services.llm.chat import load_chat
from services.llm.engines.defaults import end_tokens, read_generation_config, refuse_beyond
from services.llm.families import load_adapter
from services.llm.placement import Placement
from services.llm.visual import VisualTokens, VisualView

LONGEST: Final = 4
"""Tokens of an answer that are generated at most: the longest right one has two words and an end."""
_PADDING: Final = -1


@dataclass(frozen=True)
class Look:
    """What is left of a picture, and the questions that are asked of just that."""

    features: torch.Tensor  # (K, D) before the projector
    kept: torch.Tensor  # (K,) int64, ascending
    grid: tuple[int, int]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A greedy answer, cut after `LONGEST` tokens."""

    tokens: tuple[int, ...]
    """With the token that ends it, where it ended."""
    text: str


class Reader:
    """A LLaVA checkpoint's language side, in float32 on the CPU, as the llm runs it there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Loads the weights. Raises CheckpointError, ConfigError."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        placement = Placement(torch.device("cpu"), torch.float32)
        self._adapter = load_adapter(checkpoint, config, placement)
        language = self._adapter.language
        self._model = load_part(
            language.model_class,
            checkpoint.path,
            part="language model",
            config=language.config,
            key_mapping=dict(language.key_mapping),
            dtype=placement.dtype,
        )
        settings = read_generation_config(checkpoint.path, language.config)
        refuse_beyond(settings, checkpoint.path, "evaluation", repetition_penalty=1.0)
        self._ends = end_tokens(settings)
        self._chat = load_chat(checkpoint.path, self._adapter.image_token_id)
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}

    def prompt(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and behind the picture's place."""
        if question not in self._prompts:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            ids = self._chat.encode(self._chat.render([{"role": "user", "content": content}]))
            place = ids.index(self._adapter.image_token_id)
            self._prompts[question] = (ids[:place], ids[place + 1 :])
        return self._prompts[question]

    @torch.inference_mode()
    def answer(self, looks: Sequence[Look]) -> list[list[Answer]]:
        """The answers to each look's questions, in their order: one prefill for all, then token by token."""
        state = self._prefill(looks)
        generated: list[torch.Tensor] = []  # up to LONGEST of (B, Q)
        going = torch.ones_like(state.next)
        for step in range(LONGEST):
            generated.append(torch.where(going > 0, state.next, _PADDING))
            for end in self._ends:
                going = going * (state.next != end)
            if step == LONGEST - 1 or not bool(going.any()):
                break
            self._step(state, step)
        tokens = torch.stack(generated, dim=-1)  # (B, Q, T)
        return [
            [
                self._shown([token for token in tokens[row, place].tolist() if token != _PADDING])
                for place in range(len(look.questions))
            ]
            for row, look in enumerate(looks)
        ]

    def _prefill(self, looks: Sequence[Look]) -> _State:
        """Every look's picture and questions in one sequence, and the first token of each answer."""
        from transformers import DynamicCache

        embed = self._model.get_input_embeddings()
        rows, branches, offsets, lasts, lengths = [], [], [], [], []
        for look in looks:
            prompts = [self.prompt(question) for question in look.questions]
            picture = torch.cat([embed(torch.tensor(prompts[0][0])), self._project(look)])  # (P, H)
            behind = [ids for _, ids in prompts]
            rows.append(torch.cat([picture, embed(torch.tensor(list(chain(*behind))))]))  # (S, H)
            sizes = torch.tensor([len(ids) for ids in behind])
            branch = torch.repeat_interleave(torch.arange(1, len(behind) + 1), sizes)
            branches.append(torch.cat([torch.zeros(len(picture), dtype=torch.long), branch]))
            counted = [torch.arange(len(picture)), *(len(picture) + torch.arange(size) for size in sizes)]
            offsets.append(torch.cat(counted))
            lasts.append(len(picture) + sizes.cumsum(0) - 1)
            lengths.append(len(picture) + sizes)
        branch = pad_sequence(branches, batch_first=True, padding_value=_PADDING)  # (B, S)
        order = torch.arange(branch.shape[1])
        seen = (order[:, None] >= order) & _sees(branch, branch)  # (B, S, S)
        cache = DynamicCache()
        hidden = self._model.model(
            inputs_embeds=pad_sequence(rows, batch_first=True),
            attention_mask=_additive(seen),
            position_ids=pad_sequence(offsets, batch_first=True),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (B, S, H)
        last = pad_sequence(lasts, batch_first=True)  # (B, Q)
        first = self._likeliest(hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1])))
        return _State(cache, branch, pad_sequence(lengths, batch_first=True), first)

    def _step(self, state: _State, step: int) -> None:
        """One more token of every answer; each sees its picture, its question and itself."""
        new = torch.arange(1, state.next.shape[1] + 1).expand(len(state.next), -1)  # (B, Q)
        state.branches = torch.cat([state.branches, new], dim=1)
        hidden = self._model.model(
            inputs_embeds=self._model.get_input_embeddings()(state.next),
            attention_mask=_additive(_sees(new, state.branches)),
            position_ids=state.lengths + step,
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state
        state.next = self._likeliest(hidden)

    def _project(self, look: Look) -> torch.Tensor:
        view = VisualView(look.features, look.kept, look.grid)
        tokens = VisualTokens((view,), encoder_service_pb2.MediaLayout(), "picture")
        return self._adapter.project(tokens)

    def _likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._model.lm_head(hidden).argmax(-1)
        return found

    def _shown(self, tokens: list[int]) -> Answer:
        words = [token for token in tokens if token not in self._ends]
        return Answer(tuple(tokens), self._chat.backend.decode(words, skip_special_tokens=True).strip())


@dataclass
class _State:
    """Where B looks of up to Q questions stand."""

    cache: Any
    branches: torch.Tensor  # (B, S): 0 the picture, from 1 on which question; -1 padding
    lengths: torch.Tensor  # (B, Q): tokens before the answer
    next: torch.Tensor  # (B, Q)


def _sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether each of (B, Q) may see each of (B, S), order apart: (B, Q, S)."""
    mine = queries[:, :, None] == keys[:, None, :]
    picture: torch.Tensor = keys[:, None, :] == 0
    return mine | picture


def _additive(seen: torch.Tensor) -> torch.Tensor:
    """As attention takes it: (B, 1, Q, S) float32, 0 where seen."""
    mask = torch.zeros(seen.shape)
    return mask.masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
