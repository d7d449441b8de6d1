"""Attention over packed sequences: S segments one behind the other, each attending within itself.

A tower over images of any size packs all their patches into one sequence of n: its segments are images,
windows of an image, or slices of a video. Transformers' own way on SDPA is one call a segment, thousands for
a large image's windows; here neighbours of equal length share a call, and where there is a flash kernel for
variable lengths, all segments do.

Knows lengths and tensors, and nothing of images, windows or layers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

_FLASH_DTYPES: Final = frozenset({torch.bfloat16, torch.float16})
_FLASH_CAPABILITY: Final = (8, 0)
"""Ampere: the first that torch's flash kernels run on."""


def runs(boundaries: Tensor) -> Iterator[tuple[int, int, int]]:
    """Neighbouring segments of one length: where they start, how many they are, how long each is.

    boundaries  # (S + 1,) int32, ascending from 0: `cu_seqlens`
    """
    lengths = (boundaries[1:] - boundaries[:-1]).tolist()
    start = 0
    for length, group in itertools.groupby(lengths):
        count = len(list(group))
        yield start, count, length
        start += count * length


def split(tensor: Tensor, start: int, count: int, length: int) -> Tensor:
    """A run's rows as a batch, without a copy.

    tensor   # (n, heads, d), any strides
    returns  # (count, heads, length, d)
    """
    rows = tensor[start : start + count * length]
    return torch.unflatten(rows, 0, (count, length)).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *, longest: int, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Attention within each segment: one kernel for all of them where there is one, else one call a run.

    query, key, value  # (n, heads, d), any float dtype, any strides
    boundaries         # (S + 1,) int32, ascending from 0
    longest            # rows of the longest segment
    returns            # (n, heads, d); and each row's log-sum-exp of its scaled logits, (heads, n) float32,
                       # where the kernel hands it out
    """
    if query.is_cuda and query.dtype in _FLASH_DTYPES and _device_has_flash(query.device.index or 0):
        return _attend_by_flash(query, key, value, boundaries, longest, scaling)
    outputs, log_sums = [], []
    for run in runs(boundaries):
        queries, keys, values = (split(tensor, *run) for tensor in (query, key, value))
        if query.is_cuda:
            output = functional.scaled_dot_product_attention(queries, keys, values, scale=scaling)
        else:
            # what SDPA calls on a CPU, by its name, as only so it hands out its row sums
            output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, scale=scaling
            )  # (count, heads, length, d), (count, heads, length)
            log_sums.append(sums.transpose(0, 1).flatten(1))
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (count · length, heads, d)
    return torch.cat(outputs), torch.cat(log_sums, dim=1) if log_sums else None


def _attend_by_flash(  # pragma: no cover - needs a GPU
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """`attend` by one flash kernel for all segments; no synchronisation with the host."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # 1/√d is what it takes by itself
    options = _flash_options() | ({} if scaling == query.shape[-1] ** -0.5 else {"scale": scaling})
    output, log_sums = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        boundaries,
        boundaries,
        longest,
        longest,
        return_aux=AuxRequest(lse=True),
        **options,
    )
    return output, log_sums


@cache
def _flash_options() -> dict[str, Any]:  # pragma: no cover - needs a GPU
    """A split by the longest neighbour would change a segment's last bits; older torch never splits."""
    from torch.nn.attention.varlen import varlen_attn

    return {"num_splits": 1} if "num_splits" in inspect.signature(varlen_attn).parameters else {}


@cache
def _device_has_flash(index: int) -> bool:  # pragma: no cover - needs a GPU
    return torch.cuda.get_device_capability(index) >= _FLASH_CAPABILITY
