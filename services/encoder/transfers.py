"""Tensors between host and device: pinned and asynchronous for a GPU, nothing at all for a CPU.

A copy from pageable memory stops the host until it is done, and the GPU waits for the next one meanwhile.
Knows devices, and nothing of what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values where `device` can fetch them by itself. For a thread that nobody waits for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Tensors joined along their first dimension, on the device; pinned ones cross without a stop.

    tensors  # (bᵢ, …) each, float32
    returns  # (Σ bᵢ, …) in `dtype`
    """
    return torch.cat([tensor.to(device, non_blocking=True) for tensor in tensors]).to(dtype)


@contextmanager
def download() -> Iterator[Callable[[Tensor], Tensor]]:
    """Brings tensors to the host: all copies under way at once, then one wait for all of them.

    with download() as fetch:
        features, scores = fetch(features), fetch(scores)
    features  # not to be read before here
    """
    devices: set[torch.device] = set()

    def fetch(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        devices.add(tensor.device)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    yield fetch
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
