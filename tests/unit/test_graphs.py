"""A CUDA graph is used only where it is equal and measurably faster; whether it is takes a GPU to say."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.encoder import graphs

Recorded = Callable[[Tensor], tuple[Tensor, ...]]


def plain(value: Tensor) -> tuple[Tensor, ...]:
    return value * 2, value.sum()


def replayed(value: Tensor) -> tuple[Tensor, ...]:
    return plain(value)


def off_by_a_bit(value: Tensor) -> tuple[Tensor, ...]:
    return torch.nextafter(value * 2, torch.tensor(torch.inf)), value.sum()


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recorded, float], None]:
    """Stands in for the device: what a recording would replay, and how long it would take."""

    def stand_in(replayed: Recorded, share: float) -> None:
        monkeypatch.setattr(graphs, "GraphedForward", lambda forward, example: replayed)
        monkeypatch.setattr(
            graphs, "_median_ms", lambda forward, example: 10.0 if forward is plain else 10 * share
        )

    return stand_in


def test_a_faster_graph_is_used(record: Callable[[Recorded, float], None]) -> None:
    record(replayed, 0.5)
    assert graphs.if_faster(plain, torch.ones(2, 3)) is replayed


@pytest.mark.parametrize("share", [0.96, 1.0, 1.5])
def test_a_graph_that_gains_next_to_nothing_is_not_used(
    record: Callable[[Recorded, float], None], share: float
) -> None:
    record(replayed, share)
    assert graphs.if_faster(plain, torch.ones(2, 3)) is None


def test_a_graph_whose_outputs_differ_in_a_bit_is_not_used(
    record: Callable[[Recorded, float], None], caplog: pytest.LogCaptureFixture
) -> None:
    record(off_by_a_bit, 0.1)
    assert graphs.if_faster(plain, torch.ones(2, 3)) is None
    assert "differs from the plain forward" in caplog.text


def test_a_forward_that_cannot_be_recorded_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(forward: Recorded, example: Tensor) -> Recorded:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "GraphedForward", refuse)
    assert graphs.if_faster(plain, torch.ones(1, 3)) is None
    assert "no CUDA graph for 1×3" in caplog.text
