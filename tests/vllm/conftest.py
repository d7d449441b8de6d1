"""Fixtures for the tests of the engine vllm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_llava
from tests.vllm.engines import CONTEXT


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """A random LLaVA, which all of them share. No token ends its answers."""
    path = make_llava(tmp_path_factory.mktemp("llava"), context=CONTEXT, text_config={"eos_token_id": None})
    (path / "generation_config.json").write_text('{"pad_token_id": 0}', "utf-8")
    return path
