"""A vLLM server elsewhere, on an exported language model: the same answers, and a clear word when it goes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hiprune.errors import Unavailable
from hiprune.lm_export import export_language_model
from services.llm.process import load
from services.llm.settings import Settings
from tests.tiny import make_llava
from tests.vllm.engines import CONTEXT, answer, job

pytestmark = [pytest.mark.extra, pytest.mark.vllm]

KEY = "the server's key"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """With a token that ends answers: the server takes its tokenizer's."""
    return make_llava(tmp_path_factory.mktemp("model"), context=CONTEXT)


@pytest.fixture(scope="module")
def server(path, tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """vLLM's own server on what `hiprune export-lm` writes: its URL and process."""
    folder = tmp_path_factory.mktemp("server")
    export_language_model(path, folder / "lm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        "--model",
        str(folder / "lm"),
        "--enable-prompt-embeds",
        "--enforce-eager",
        "--dtype=float32",
    ]
    more = ["--host=127.0.0.1", f"--port={port}", f"--api-key={KEY}", "--enable-prompt-tokens-details"]
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *more],
            stdout=log,
            stderr=log,
            env=environ,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield url, process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def test_answers_are_those_of_transformers_and_end_when_the_server_does(path, server):
    url, process = server
    arguments = ["--model", str(path), "--engine", "vllm-http", "--url", url]
    remote = load(Settings.read(arguments, {"HIPRUNE_LLM_URL_KEY": KEY}))
    plain = load(Settings.read(["--model", str(path)], {}))
    for model in (remote, plain):
        await model.engine.start()
    assert remote.engine.context_length == CONTEXT
    wanted = [job(plain, 3 + 29 * number, 12, seed=number) for number in range(8)]
    expected = [await answer(plain, each) for each in wanted]
    assert await asyncio.gather(*(answer(remote, each) for each in wanted)) == expected
    long = job(remote, 400, 3, seed=50, owner="one")
    first = [step async for step in remote.engine.generate(long)]
    again = [step async for step in remote.engine.generate(long)]
    assert (first[-1].cached, again[-1].cached) == (0, 384)
    assert [step.token for step in again] == [step.token for step in first]
    endless = [
        each
        for each in (job(plain, 5, 300, seed=number) for number in range(6))
        if len(await answer(plain, each)) == each.max_tokens
    ]
    running = remote.engine.generate(dataclasses.replace(endless[0], max_tokens=900))
    await anext(running)
    os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="cannot be reached"):
        async for _ in running:
            pass
    with pytest.raises(Unavailable, match="cannot be reached"):
        await answer(remote, wanted[0])
    for model in (remote, plain):
        await model.engine.stop()
