"""`torch.Tensor` to and from the wire's `Tensor`. Knows shapes and bytes; knows no model and no service.

Nothing is allocated before rank, dtype and length are checked, and nothing is ever unpickled. Elements that
lie outside of their message, in shared memory, are refused unless the caller says where to read them: see
`hiprune.shared_memory`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from math import prod
from typing import Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf.message import Message

from hiprune.arrays import shown
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

MAX_ELEMENTS: Final = 2**60
"""What torch and numpy count with is 64 bits wide, in bytes. Bytes run out long before, except for none."""

M = TypeVar("M", bound=Message)


class Memory(Protocol):
    """What tensors of one answer may lie in besides the answer itself."""

    def read(self, place: tensor_pb2.SharedMemory, length: int, *, field: str) -> memoryview:
        """The `length` bytes at `place`, read-only and not copied. Raises InvalidInput below `field`."""


def to_proto(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """A tensor of any shape, wire dtype and device as bytes: a copy to the host, another into the message."""
    message = tensor_pb2.Tensor()
    fill(message, tensor)
    return message


def fill(message: tensor_pb2.Tensor, tensor: torch.Tensor) -> None:
    """`to_proto` into a message that lies where it belongs: setting it there would copy the bytes again."""
    describe(message, tensor)
    message.data = elements(tensor).tobytes()


def describe(message: tensor_pb2.Tensor, tensor: torch.Tensor) -> None:
    """Sets dtype and shape, and no payload."""
    message.dtype = WIRE_DTYPES[tensor.dtype]
    message.shape[:] = tensor.shape


def elements(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes (n,) of a tensor as they go on the wire; the tensor's own memory where it can be."""
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def length_of(message: tensor_pb2.Tensor) -> int:
    """Bytes that a message's elements take, wherever they lie; 0 for a dtype that is none."""
    dtype = TORCH_DTYPES.get(message.dtype)
    return prod(message.shape) * dtype.itemsize if dtype is not None else 0


def check(
    message: tensor_pb2.Tensor,
    *,
    field: str,
    shape: Sequence[int | None],
    dtypes: Collection[torch.dtype] = FLOATS,
    memory: Memory | None = None,
) -> torch.dtype:
    """The message's dtype, once its rank, extents, dtype and length are as expected; allocates nothing.

    `shape` is what the caller expects, None for a free extent: its length is the rank. Elements in shared
    memory are refused unless `memory` holds them.
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
            f"rank is {len(extents)} (shape {shown(extents)}), expected {len(shape)}", field=f"{field}.shape"
        )
    if any(extent < 0 for extent in extents) or any(
        want is not None and want != got for want, got in zip(shape, extents, strict=True)
    ):
        raise InvalidInput(f"shape is {shown(extents)}, expected {shown(shape)}", field=f"{field}.shape")
    need = prod(extents) * dtype.itemsize
    payload = message.WhichOneof("payload")
    if payload is None:
        raise InvalidInput(f"has no payload, expected {need} bytes of data", field=f"{field}.data")
    held = len(_payload(message, need, field, memory))
    if held != need:
        raise InvalidInput(
            f"holds {held} bytes, expected {need} for shape {shown(extents)} of {name}",
            field=f"{field}.{payload}",
        )
    if prod(max(extent, 1) for extent in extents) > MAX_ELEMENTS:  # 0 × 2**62 × 2 has no bytes, and strides
        raise InvalidInput(
            f"shape is {shown(extents)}, whose extents other than 0 multiply to more than {MAX_ELEMENTS}",
            field=f"{field}.shape",
        )
    return dtype


def from_proto(
    message: tensor_pb2.Tensor,
    *,
    field: str,
    shape: Sequence[int | None],
    dtypes: Collection[torch.dtype] = FLOATS,
    finite: bool = False,
    memory: Memory | None = None,
) -> torch.Tensor:
    """The message's tensor on the CPU, in memory of its own, after `check`.

    With `finite`, NaN and infinities are refused. Raises InvalidInput.
    """
    dtype = check(message, field=field, shape=shape, dtypes=dtypes, memory=memory)
    extents = tuple(message.shape)
    data = _payload(message, length_of(message), field, memory)
    if not data:
        return torch.empty(extents, dtype=dtype)
    # torch warns of read-only memory, so the bytes get a home of their own: one copy, 10 GB/s
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(extents)
    if finite and dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        where = int((~torch.isfinite(tensor)).flatten().nonzero()[0])
        raise InvalidInput(
            f"element {where} is {float(tensor.flatten()[where])}, expected finite numbers", field=field
        )
    return tensor


def take_rows(
    message: tensor_pb2.Tensor, indices: npt.NDArray[np.int64], memory: Memory | None = None
) -> tensor_pb2.Tensor:
    """Rows `indices` (K,) of a checked (N, D) tensor as a (K, D) one, bit for bit, in any dtype."""
    rows, channels = message.shape
    row_bytes = channels * TORCH_DTYPES[message.dtype].itemsize
    data = _payload(message, rows * row_bytes, "rows", memory)
    table = np.frombuffer(data, np.uint8).reshape(rows, row_bytes)
    kept = table[indices].tobytes()
    return tensor_pb2.Tensor(dtype=message.dtype, shape=[len(indices), channels], data=kept)


def inlined(message: M, memory: Memory | None) -> M:
    """The message with all of its tensors' elements within; itself where they are. No segment is named in it.

    Raises InvalidInput when an element is not in `memory`.
    """
    if not any(each.WhichOneof("payload") == "shared_memory" for each in tensors_in(message)):
        return message
    whole = type(message)()
    whole.CopyFrom(message)
    for each in tensors_in(whole):
        if each.WhichOneof("payload") == "shared_memory":
            each.data = bytes(_payload(each, length_of(each), "tensor", memory))
    return whole


def tensors_in(message: Message) -> Iterator[tensor_pb2.Tensor]:
    """Every tensor of a message, however deep."""
    if isinstance(message, tensor_pb2.Tensor):
        yield message
        return
    for _, value in message.ListFields():
        if isinstance(value, Message):
            yield from tensors_in(value)
        elif not isinstance(value, str | bytes | int | float):  # a repeated field
            for each in value:
                if isinstance(each, Message):
                    yield from tensors_in(each)


def _payload(
    message: tensor_pb2.Tensor, length: int, field: str, memory: Memory | None
) -> bytes | memoryview:
    """The elements: a copy where they are in the message, whose every reading makes one; else `length` bytes.

    Raises InvalidInput for shared memory that is not to be had here.
    """
    if message.WhichOneof("payload") != "shared_memory":
        return message.data
    if memory is None:
        raise InvalidInput("lies in shared memory, expected data", field=f"{field}.shared_memory")
    return memory.read(message.shared_memory, length, field=f"{field}.shared_memory")
