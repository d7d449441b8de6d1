"""`torch.Tensor` to and from the wire's `Tensor`. Knows shapes and bytes; knows no model and no service.

Nothing is allocated before rank, dtype and length are checked, and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from hiprune.errors import InvalidInput
from hiprune.v1 import tensor_pb2

TORCH_DTYPES: Final[dict[tensor_pb2.DataType.ValueType, torch.dtype]] = {
    tensor_pb2.DATA_TYPE_BF16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_F16: torch.float16,
    tensor_pb2.DATA_TYPE_F32: torch.float32,
    tensor_pb2.DATA_TYPE_I32: torch.int32,
}
WIRE_DTYPES: Final = {torch_type: wire for wire, torch_type in TORCH_DTYPES.items()}
_NAMES: Final = {torch_type: tensor_pb2.DataType.Name(wire) for wire, torch_type in TORCH_DTYPES.items()}
FLOATS: Final = frozenset({torch.bfloat16, torch.float16, torch.float32})


def to_proto(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """A tensor of any shape, wire dtype and device as bytes: a copy to the host, another into the message."""
    flat = tensor.detach().contiguous().cpu()
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return tensor_pb2.Tensor(dtype=WIRE_DTYPES[tensor.dtype], shape=list(tensor.shape), data=data)


def check(
    message: tensor_pb2.Tensor,
    *,
    field: str,
    shape: Sequence[int | None],
    dtypes: Collection[torch.dtype] = FLOATS,
) -> torch.dtype:
    """The message's dtype, once its rank, extents, dtype and length are as expected; allocates nothing.

    `shape` is what the caller expects, None for a free extent: its length is the rank.
    Raises InvalidInput naming `field`, the value and the bound.
    """
    dtype = TORCH_DTYPES.get(message.dtype)
    known = message.dtype in tensor_pb2.DataType.values()
    name = tensor_pb2.DataType.Name(message.dtype) if known else str(message.dtype)
    if dtype is None or dtype not in dtypes:
        legal = ", ".join(_NAMES[each] for each in TORCH_DTYPES.values() if each in dtypes)
        raise InvalidInput(f"dtype is {name}, expected {legal}", field=f"{field}.dtype")
    extents = tuple(message.shape)
    if len(extents) != len(shape):
        raise InvalidInput(
            f"rank is {len(extents)} (shape {_show(extents)}), expected {len(shape)}", field=f"{field}.shape"
        )
    if any(extent < 0 for extent in extents) or any(
        want is not None and want != got for want, got in zip(shape, extents, strict=True)
    ):
        raise InvalidInput(f"shape is {_show(extents)}, expected {_show(shape)}", field=f"{field}.shape")
    need = prod(extents) * dtype.itemsize
    if message.WhichOneof("payload") != "data":
        raise InvalidInput(f"has no payload, expected {need} bytes of data", field=f"{field}.data")
    if len(message.data) != need:
        raise InvalidInput(
            f"holds {len(message.data)} bytes, expected {need} for shape {_show(extents)} of {name}",
            field=f"{field}.data",
        )
    return dtype


def from_proto(
    message: tensor_pb2.Tensor,
    *,
    field: str,
    shape: Sequence[int | None],
    dtypes: Collection[torch.dtype] = FLOATS,
    finite: bool = False,
) -> torch.Tensor:
    """The message's tensor on the CPU, in memory of its own, after `check`.

    With `finite`, NaN and infinities are refused. Raises InvalidInput.
    """
    dtype = check(message, field=field, shape=shape, dtypes=dtypes)
    extents = tuple(message.shape)
    if not message.data:
        return torch.empty(extents, dtype=dtype)
    # torch warns of read-only memory, so the bytes get a home of their own: one copy, 10 GB/s
    tensor = torch.frombuffer(bytearray(message.data), dtype=dtype).reshape(extents)
    if finite and dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        where = int((~torch.isfinite(tensor)).flatten().nonzero()[0])
        raise InvalidInput(
            f"element {where} is {float(tensor.flatten()[where])}, expected finite numbers", field=field
        )
    return tensor


def take_rows(message: tensor_pb2.Tensor, indices: npt.NDArray[np.int64]) -> tensor_pb2.Tensor:
    """Rows `indices` (K,) of a checked (N, D) tensor as a (K, D) one, bit for bit, in any dtype."""
    rows, channels = message.shape
    row_bytes = channels * TORCH_DTYPES[message.dtype].itemsize
    table = np.frombuffer(message.data, np.uint8).reshape(rows, row_bytes)
    kept = table[indices].tobytes()
    return tensor_pb2.Tensor(dtype=message.dtype, shape=[len(indices), channels], data=kept)


def _show(shape: Sequence[int | None]) -> str:
    """`(196, *)`: a shape for people, free extents as a star; a stranger's may have any rank."""
    extents = ["*" if extent is None else str(extent) for extent in shape[:8]]
    return "(" + ", ".join(extents + ["…"] * (len(shape) > 8)) + ")"
