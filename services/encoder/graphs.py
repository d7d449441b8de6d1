"""Forwards of fixed shapes as CUDA graphs: hundreds of kernel launches become one.

A tower's forward over one small image is limited by how fast the host launches kernels, not by the GPU. A
graph is kept only where it measures faster, and equal, at start on the very device: see `if_faster`.
Knows functions from a tensor to tensors, and no tower.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

log = logging.getLogger("hiprune.encoder")

Forward: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]

MUST_GAIN: Final = 0.95
"""A graph holds memory, so it has to take at most this share of the plain forward's time."""

_ROUNDS: Final = 10
_WARM_UP: Final = 3  # before a capture: kernels are picked, libraries take their workspaces


class GraphedForward:
    """A recorded forward: copies its input in, replays, and hands out the same output tensors each time."""

    def __init__(self, forward: Forward, example: Tensor) -> None:
        """Records `forward` on the shape of `example`. Raises RuntimeError for what cannot be recorded."""
        self._input = example.clone()
        # a recording is of the current device, whatever stream it is told
        with torch.cuda.device(example.device):
            self._graph, self._output = self._record(forward, example.device)

    def _record(self, forward: Forward, device: torch.device) -> tuple[Any, tuple[Tensor, ...]]:
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped upstream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                forward(self._input)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may pin memory meanwhile, which a global recording would take for its own
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            return graph, forward(self._input)

    def __call__(self, value: Tensor) -> tuple[Tensor, ...]:
        """`forward(value)`, in tensors that the next call overwrites."""
        self._input.copy_(value)
        self._graph.replay()
        return self._output


def if_faster(forward: Forward, example: Tensor) -> GraphedForward | None:
    """The recorded forward, if its outputs equal the plain one's bit for bit and it is measurably faster."""
    shape = "×".join(map(str, example.shape))
    try:
        graph = GraphedForward(forward, example)
        probe = torch.rand_like(example)
        plain = [output.clone() for output in forward(probe)]
        if not all(torch.equal(one, other) for one, other in zip(plain, graph(probe), strict=True)):
            log.warning("the CUDA graph for %s differs from the plain forward and is not used", shape)
            return None
        ratio = _median_ms(graph, probe) / _median_ms(forward, probe)
    except RuntimeError as error:  # a forward that cannot be recorded still runs
        log.warning("no CUDA graph for %s: %s", shape, error)
        return None
    kept = ratio <= MUST_GAIN
    log.info("the CUDA graph for %s takes × %.2f: %s", shape, ratio, "used" if kept else "not used")
    return graph if kept else None


def _median_ms(forward: Forward, example: Tensor) -> float:
    """Median milliseconds of one forward, from a host that waits for each."""
    times: list[float] = []
    for _ in range(_ROUNDS):
        begun: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begun.record()
        forward(example)
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return statistics.median(times)
