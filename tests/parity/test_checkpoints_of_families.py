"""Every family's checkpoints: a damaged one ends the encoder in a line that says why; no two models mix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from hiprune.calls import connect
from hiprune.checkpoints import open_checkpoint
from hiprune.client import Client
from hiprune.errors import HipruneError, from_rpc
from hiprune.families import families
from hiprune.stack import Stack
from hiprune.v1 import media_pb2, pruner_service_pb2, pruner_service_pb2_grpc
from tests.stacks import picture
from tests.tiny import make_llava
from tests.tiny_anyres import make_llava_next, make_llava_onevision
from tests.tiny_qwen import make_qwen2_5_vl
from tests.tiny_video_llava import make_video_llava

MAKERS = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "qwen2_5_vl": make_qwen2_5_vl,
    "video_llava": make_video_llava,
}
ONE_THREAD = {f"HIPRUNE_{service}_THREADS": "1" for service in ("ENCODER", "PRUNER", "LLM")}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def path(request, tmp_path_factory) -> Path:
    """A tiny model of each family, whole; tests change copies of it."""
    return MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param, seed=1)


def test_every_family_is_here():
    assert sorted(MAKERS) == families()


def refused(path: Path) -> str:
    """What an encoder started on `path` says as it ends, with code 2 and in one line."""
    arguments = ["--model", str(path), "--listen", f"unix:{path}/encoder.sock"]
    done = subprocess.run(
        [sys.executable, "-m", "services.encoder", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HIPRUNE_ENCODER_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hiprune encoder: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def test_a_language_only_checkpoint_is_refused(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "words")
    is_vision = open_checkpoint(str(path)).facts.vision_keys.match
    weights = load_file(path / "model.safetensors")
    save_file({key: each for key, each in weights.items() if not is_vision(key)}, copy / "model.safetensors")
    assert "no vision tensor" in refused(copy)


def test_a_truncated_file_is_named(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "cut")
    file = copy / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size * 2 // 3)
    line = refused(copy)
    assert str(file) in line
    assert "truncated" in line


def test_a_missing_key_is_named(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "hole")
    facts = open_checkpoint(str(path)).facts
    weights = load_file(path / "model.safetensors")
    # of every tower, the bias of a layer that runs
    layer = f".{facts.deep_layer - 1}."
    gone = [key for key in weights if facts.vision_keys.match(key) and layer in key and key.endswith(".bias")]
    assert gone
    key = max(gone)
    save_file({name: each for name, each in weights.items() if name != key}, copy / "model.safetensors")
    line = refused(copy)
    assert "missing keys" in line
    assert facts.vision_keys.sub("", key, count=1).lstrip(".") in line


async def test_services_on_fine_tunes_of_the_same_shapes_are_refused(path, tmp_path):
    tuned = str(MAKERS[path.name](tmp_path / "tuned", seed=2))
    image = picture("scene00.png")
    with Stack(model=str(path), redis=False, environ={**ONE_THREAD, "HIPRUNE_LLM_MODEL": tuned}) as stack:
        async with Client(stack.address) as client:
            with pytest.raises(HipruneError) as of_llm:
                await client.ask("count the shapes .", image)
        with pruner_alone(tuned, stack.encoder_address) as address:
            async with connect(address) as channel:
                stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
                request = pruner_service_pb2.PruneImageRequest(media=media_pb2.Media(image=image))
                with pytest.raises(grpc.aio.AioRpcError) as of_pruner:
                    await stub.PruneImage(request, timeout=60)
    for error in (of_llm.value, from_rpc(of_pruner.value, peer="pruner")):
        assert (error.code.name, error.reason) == ("FAILED_PRECONDITION", "MODEL_MISMATCH")


@contextmanager
def pruner_alone(model: str, encoder: str) -> Iterator[str]:
    """The address of a pruner on a model of its own beside somebody else's encoder."""
    environ = {**ONE_THREAD, "HIPRUNE_PRUNER_ENCODER": encoder}
    stack = Stack(model=model, redis=False, environ=environ)
    try:
        stack.start_service("pruner")
        stack.wait_ready("pruner")
        yield stack.pruner_address
    finally:
        stack.stop()
