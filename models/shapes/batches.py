"""Scenes and questions as tensors: what a step of training, or a sum of answers, works on.

A batch follows from a seed and its number alone, so that a run can stop anywhere and go on as if it had not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final, Self

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from models.shapes import architecture, scenes
from models.shapes.architecture import ASSISTANT, BOS, EOS, MEAN, PAD, STD, USER
from models.shapes.questions import TYPES, Phrase, caption, phrases, questions
from models.shapes.scenes import COLOURS, GRID, KINDS, MOST_THINGS, SIDE, SIZES

IGNORED: Final = -100
HELD_OUT: Final = 1_000_003
"""Seeds from here on are for evaluation; training refuses them."""


@dataclass
class Batch:
    """B pictures, T things at most, N patches, Q questions a picture, S tokens of a picture's questions, P
    phrases in them."""

    pixels: torch.Tensor  # (B, 3, SIDE, SIDE) float32, normalised
    owners: torch.Tensor  # (B, N) int64: 0 background, else 1 + the thing
    masks: torch.Tensor  # (B, N, PATCH²) bool: which pixels of a patch are its owner's
    kinds: torch.Tensor  # (B, T + 1) int64, by owner; 0 is background, else 1 + the kind
    colours: torch.Tensor  # (B, T + 1) int64, likewise
    sizes: torch.Tensor  # (B, T + 1) int64, likewise
    middles: torch.Tensor  # (B, T + 1, 2) float32, x and y from 0 to 1
    captions: torch.Tensor  # (B, C) int64, padded on the right
    question_ids: torch.Tensor  # (B, Q, L) int64 with BOS and EOS, padded on the right: for CLIP's text tower
    about: torch.Tensor  # (B, Q, T + 1) bool, by owner
    ids: torch.Tensor  # (B, S) int64: questions and answers behind each other
    branches: torch.Tensor  # (B, S) int64: which question a token is of, from 1; -1 is padding
    offsets: torch.Tensor  # (B, S) int64: how far a token is into its question
    labels: torch.Tensor  # (B, S) int64: the token that comes next, where it is of an answer; else IGNORED
    phrase_ends: torch.Tensor  # (B, P) int64: the place among `ids` where a phrase ends; -1 is padding
    phrase_fits: torch.Tensor  # (B, P, T + 1) bool, by owner: what the phrase fits
    phrase_befores: torch.Tensor  # (B, P) int64: which phrase of the same question it is compared with, or -1
    types: list[list[str]] = field(default_factory=list)  # of each picture's questions

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        moved = {
            each.name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for each in fields(self)
            for value in [getattr(self, each.name)]
        }
        return type(self)(**moved)


class Batches(Dataset[Batch]):
    """Batch number n of a seed, with questions of such types in turn."""

    def __init__(self, seed: int, size: int, questions_each: int, types: tuple[str, ...] = TYPES) -> None:
        self.seed, self.size, self.questions_each, self.types = seed, size, questions_each, types
        self._tokenizer: PreTrainedTokenizerFast | None = None

    def __getitem__(self, number: int) -> Batch:
        if self._tokenizer is None:
            self._tokenizer = architecture.tokenizer()
        return make(self._tokenizer, self.seed, number, self.size, self.questions_each, self.types)


def make(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    number: int,
    size: int,
    questions_each: int,
    types: tuple[str, ...] = TYPES,
) -> Batch:
    """`size` pictures with up to `questions_each` questions of such types in turn."""
    rows = [
        _row(tokenizer, scenes.scene(seed, number * size + order), questions_each, types)
        for order in range(size)
    ]
    most = max(len(row.types) for row in rows)
    return Batch(
        pixels=torch.stack([row.pixels for row in rows]),
        owners=torch.stack([row.owners for row in rows]),
        masks=torch.stack([row.masks for row in rows]),
        kinds=torch.stack([row.kinds for row in rows]),
        colours=torch.stack([row.colours for row in rows]),
        sizes=torch.stack([row.sizes for row in rows]),
        middles=torch.stack([row.middles for row in rows]),
        captions=_padded([row.caption for row in rows], PAD),
        question_ids=torch.stack(
            [_padded([*row.questions, *[[BOS, EOS]] * (most - len(row.questions))], PAD, 20) for row in rows]
        ),
        about=_same_height([row.about for row in rows]),
        ids=_padded([row.ids for row in rows], PAD),
        branches=_padded([row.branches for row in rows], -1),
        offsets=_padded([row.offsets for row in rows], 0),
        labels=_padded([row.labels for row in rows], IGNORED),
        phrase_ends=_padded([row.phrase_ends for row in rows], -1),
        phrase_fits=_same_height([_fits([each.fits for each in row.phrases]) for row in rows]),
        phrase_befores=_padded([row.phrase_befores for row in rows], -1),
        types=[row.types for row in rows],
    )


@dataclass
class _Row:
    pixels: torch.Tensor
    owners: torch.Tensor
    masks: torch.Tensor
    kinds: torch.Tensor
    colours: torch.Tensor
    sizes: torch.Tensor
    middles: torch.Tensor
    about: torch.Tensor
    caption: list[int]
    questions: list[list[int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    phrases: list[Phrase] = field(default_factory=list)
    phrase_ends: list[int] = field(default_factory=list)
    phrase_befores: list[int] = field(default_factory=list)


def _row(
    tokenizer: PreTrainedTokenizerFast, scene: scenes.Scene, questions_each: int, types: tuple[str, ...]
) -> _Row:
    draw = np.random.default_rng([*scene.number, 2])
    picture, pixel_owners = scenes.render(scene)
    owners = torch.from_numpy(scenes.patch_owners(pixel_owners).reshape(GRID * GRID))
    asked = questions(scene, questions_each, draw, types)
    row = _Row(
        pixels=(torch.from_numpy(picture).permute(2, 0, 1) / 255 - MEAN[0]) / STD[0],
        owners=owners,
        masks=torch.from_numpy(scenes.patches(pixel_owners)) == owners[:, None],
        kinds=_by_owner([list(KINDS).index(each.kind) for each in scene.things]),
        colours=_by_owner([list(COLOURS).index(each.colour) for each in scene.things]),
        sizes=_by_owner([list(SIZES).index(each.size) for each in scene.things]),
        middles=torch.zeros(MOST_THINGS + 1, 2),
        about=_fits([each.about for each in asked]),
        caption=[*_ids(tokenizer, caption(scene, draw)), EOS],
    )
    for order, each in enumerate(scene.things, start=1):
        row.middles[order] = torch.tensor([each.x, each.y]) / SIDE
    for branch, each in enumerate(asked, start=1):
        question, answer = _ids(tokenizer, each.text), _ids(tokenizer, each.answer)[1:]
        tokens = [*question[1:], ASSISTANT, *answer, EOS]
        found = phrases(scene, each.text)
        compared = each.type == "relation"
        row.phrase_befores += [len(row.phrases) if compared and order else -1 for order in range(len(found))]
        row.phrases += found
        row.phrase_ends += [len(row.ids) + phrase.end for phrase in found]  # a word is a token
        row.ids += tokens
        row.branches += [branch] * len(tokens)
        row.offsets += range(len(tokens))
        row.labels += [IGNORED] * (len(question) - 1) + [*answer, EOS, IGNORED]
        row.questions.append([*question, EOS])
        row.types.append(each.type)
    return row


def _fits(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """(rows, T + 1) bool, by owner, from numbers of things."""
    made = torch.zeros(len(rows), MOST_THINGS + 1, dtype=torch.bool)
    for row, things in zip(made, rows, strict=True):
        row[[thing + 1 for thing in things]] = True
    return made


def _same_height(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Blocks (R, T + 1) with as many rows as the highest has, stacked; what is added is False."""
    return torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True)


def _by_owner(values: list[int]) -> torch.Tensor:
    made = torch.zeros(MOST_THINGS + 1, dtype=torch.int64)
    made[1 : len(values) + 1] = torch.tensor(values) + 1
    return made


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def _padded(rows: list[list[int]], value: int, length: int = 0) -> torch.Tensor:
    length = max(length, *(len(row) for row in rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


PREFIX: Final = (BOS, USER)
"""What stands before a picture's tokens in the prompt."""
