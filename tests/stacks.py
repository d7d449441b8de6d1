"""Fixtures: the whole service as real processes, and what the tests ask it. Loaded as a pytest plugin."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hiprune.checkpoints import open_checkpoint
from hiprune.client import Client
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import Stack

SAMPLES = EMBEDDED_MODEL.parents[1] / "samples"
TOKENS = int(json.loads((EMBEDDED_MODEL / "config.json").read_text("utf-8"))["image_seq_length"])
"""Visual tokens of the embedded model, unpruned."""
THIRD = round(TOKENS / 3)
"""What its default policy keeps of them."""
FACTS = open_checkpoint(str(EMBEDDED_MODEL)).facts
"""Which of its layers are scored."""


def questions() -> list[dict[str, str]]:
    """The samples' questions: image, type, question, truth, unpruned_answer."""
    content: list[dict[str, str]] = json.loads((SAMPLES / "questions.json").read_text("utf-8"))
    return content


def one_of_each_picture() -> list[dict[str, str]]:
    """The first question about each sample."""
    return list({sample["image"]: sample for sample in reversed(questions())}.values())[::-1]


def picture(name: str) -> bytes:
    """A sample's encoded image."""
    return (SAMPLES / name).read_bytes()


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Redis, encoder, pruner and llm on the embedded model; shared by all tests that do it no harm."""
    with Stack() as running:
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    """A client of the shared stack."""
    async with Client(stack.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def model() -> Path:
    """The embedded model's directory."""
    return EMBEDDED_MODEL
