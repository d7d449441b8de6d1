"""Where the model runs and in what precision: chosen here, once, and logged with the reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from hiprune.config import ConfigError

log = logging.getLogger("hiprune.llm")


@dataclass(frozen=True, slots=True)
class Placement:
    """Device and dtype of every weight of this service."""

    device: torch.device
    dtype: torch.dtype


def place(device: str, dtype: str, stored: Any) -> Placement:
    """The placement for two settings, either of them `auto`.

    `stored` is the checkpoint's dtype, as a torch dtype or its name; None: float32. Raises ConfigError.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device (--device): got 'cuda', but torch sees no GPU; expected cpu or auto")
    chosen = torch.device("cuda" if device != "cpu" and has_gpu else "cpu")
    why = {"auto": "a GPU is there" if has_gpu else "there is no GPU"}.get(device, "as set")
    if dtype != "auto":
        precision, because = getattr(torch, dtype), "as set"
    elif chosen.type == "cpu":
        precision, because = torch.float32, "CPUs are slow in half precision"
    else:
        named = stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored), None)
        precision = named if isinstance(named, torch.dtype) else torch.float32
        because = "the checkpoint's own"
    log.info("device %s (%s), dtype %s (%s)", chosen, why, precision, because)
    return Placement(chosen, precision)
