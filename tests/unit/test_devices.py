"""Claims about a GPU: what torch is told, and when it is given up. Needs none: torch is faked at the seam."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from hiprune import checkpoints, devices
from hiprune.config import EMBEDDED_MODEL, ConfigError
from hiprune.telemetry import start_clock
from hiprune.v1 import media_pb2
from services.encoder import process as encoder
from services.encoder.engine import VisionEngine
from services.encoder.families import Prepared, load_tower
from services.encoder.settings import Settings as EncoderSettings
from services.llm import process as llm
from services.llm.placement import Placement
from services.llm.settings import Settings as LanguageModelSettings


class Stop(Exception):
    """Ends a load behind the part that is tested."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int | None]]:
    """What torch was asked for; loading stops behind that."""
    calls: list[tuple[float, int | None]] = []

    def stop(*args: object) -> None:
        raise Stop

    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: calls.append((share, device))
    )
    monkeypatch.setattr("hiprune.checkpoints.open_checkpoint", stop)
    monkeypatch.setattr(llm, "load_adapter", stop)
    return calls


@pytest.mark.parametrize(
    ("device", "share", "expected"),
    [
        ("cuda", "0.2", [(0.2, None)]),
        ("cuda:1", "0.2", [(0.2, 1)]),
        ("cuda", "0", []),
        ("cpu", "0.2", []),
    ],
)
def test_the_encoder_takes_its_share_and_no_more(
    monkeypatch: pytest.MonkeyPatch, asked: list[object], device: str, share: str, expected: list[object]
) -> None:
    monkeypatch.setattr(encoder, "choose_device", lambda _: (torch.device(device), torch.bfloat16))
    settings = EncoderSettings.read([], {"HIPRUNE_ENCODER_GPU_MEMORY_FRACTION": share})
    with pytest.raises(Stop):
        encoder._load(settings)
    assert asked == expected


@pytest.mark.parametrize(
    ("device", "engine", "expected"),
    [
        ("cuda", "transformers", [(0.7, None)]),
        ("cpu", "transformers", []),
        ("cuda", "vllm", []),  # it is told itself, as an argument
    ],
)
def test_the_llm_takes_its_share_and_no_more(
    monkeypatch: pytest.MonkeyPatch, asked: list[object], device: str, engine: str, expected: list[object]
) -> None:
    monkeypatch.setattr(llm, "place", lambda *_: Placement(torch.device(device), torch.bfloat16))
    settings = LanguageModelSettings.read(["--engine", engine, "--gpu-memory-utilization", "0.7"], {})
    with pytest.raises(Stop):
        llm.load(settings)
    assert asked == expected


def test_a_share_is_no_more_than_the_whole() -> None:
    with pytest.raises(ConfigError, match="gpu_memory_fraction"):
        EncoderSettings.read(["--gpu-memory-fraction", "1.1"], {})


def test_torch_takes_such_a_bound_with_and_without_a_number_of_the_gpu() -> None:
    """The seam's other side: without CUDA torch says so, and does not complain of the arguments."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0, None)
        return
    for index in (None, 0):
        with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda|driver"):
            torch.cuda.set_per_process_memory_fraction(0.5, index)


@pytest.fixture
def told() -> Iterator[None]:
    """Leaves what torch is told as it was."""
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("device", "expected"), [("cuda", False), ("cpu", True)])
def test_a_tower_on_a_gpu_is_loaded_where_torch_plans_no_shape_and_rounds_nothing(
    monkeypatch: pytest.MonkeyPatch, told: None, device: str, expected: bool
) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    checkpoint = checkpoints.open_checkpoint(str(EMBEDDED_MODEL))
    found: list[bool] = []

    def load(*_: object) -> None:
        found.extend((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32))

    monkeypatch.setattr("services.encoder.families.llava.load", load)
    load_tower(checkpoint, None, torch.device(device), torch.bfloat16)
    assert found == [expected, expected]


async def test_an_encoder_whose_gpu_is_lost_says_so_and_one_whose_memory_is_full_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_LOOK_EVERY_S", 0.001)
    lost: list[str] = []

    def synchronize(device: torch.device) -> None:
        if lost:
            raise RuntimeError(f"CUDA error: {lost[0]}\nand how to debug it")

    class Tower:
        device = torch.device("cuda", 1)

        def patches(self, *_: object) -> int:
            return 1

        def prepare(self, *_: object) -> Prepared:
            return Prepared(torch.zeros(1), 1)

        def encode(self, *_: object) -> None:
            raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    picture = media_pb2.Media(image=(EMBEDDED_MODEL.parents[1] / "samples" / "scene00.png").read_bytes())
    engine = VisionEngine(Tower(), EncoderSettings())  # type: ignore[arg-type]
    for reason in ("", "an illegal memory access was encountered"):
        lost.extend([reason] if reason else [])
        with pytest.raises(RuntimeError, match="out of memory"):
            await engine.encode(picture, [], aligned=False, clock=start_clock())
        failing = asyncio.create_task(engine.failed())
        await asyncio.sleep(0.02)
        assert failing.done() is bool(reason)
        if not reason:
            failing.cancel()
    assert failing.result() == f"cuda:1 takes no more work: CUDA error: {lost[0]}"

    await engine.close()
