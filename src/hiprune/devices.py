"""A GPU as a service's process uses it: what torch is told before a model runs, and whether it still works.

Knows torch and no model. On a CPU all of this does nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import torch

log = logging.getLogger("hiprune.devices")

_LOOK_EVERY_S: Final = 1.0


def bound_memory(device: torch.device, share: float) -> None:
    """Bounds what torch allocates in this process to a share of the GPU's memory; 0: no bound.

    Beyond it a forward fails, and not the neighbour's.
    """
    if share and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device.index)


def settle(device: torch.device) -> None:
    """Tells torch, for the whole process, which of its kernels models on a GPU are to use.

    Not cuDNN's attention, which it prefers on Hopper: that makes a plan for each new shape and thread, and
    each decoded token is a new length. And no TF32 for float32, which it takes for convolutions: decision 29.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


class Watch:
    """Finds that a GPU takes no more work from this process: after an illegal access every call fails."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reason = ""

    def _look(self) -> None:
        """After an error, on any thread: was it the work's, or is the device lost?"""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            self._reason = f"{self._device} takes no more work: {str(error).splitlines()[0]}"
            log.error("%s", self._reason)

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Looks after an error of the block's, on a thread: what else runs there may take a while to end."""
        try:
            yield
        except RuntimeError:
            await asyncio.to_thread(self._look)
            raise

    async def failed(self) -> str:
        """See `hiprune.server.CanFail`."""
        while not self._reason:  # noqa: ASYNC110  # other threads look
            await asyncio.sleep(_LOOK_EVERY_S)
        return self._reason
