"""Tensors of clients to and from the wire's `Tensor`, whether they have numpy, torch, both or neither.

`Array` is what an answer holds: it becomes numpy's or torch's when asked to, and either is imported then.
What a caller sends is told by what it can do, so that nothing is imported for it either. The services, which
have torch, read theirs with `hiprune.tensors`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hiprune.errors import Internal, InvalidInput
from hiprune.v1 import tensor_pb2

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

WIRE_DTYPES: Final = {
    "bfloat16": tensor_pb2.DATA_TYPE_BF16,
    "float16": tensor_pb2.DATA_TYPE_F16,
    "float32": tensor_pb2.DATA_TYPE_F32,
    "int32": tensor_pb2.DATA_TYPE_I32,
}
_NAMES: Final = {wire: name for name, wire in WIRE_DTYPES.items()}
_ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}
FLOATS: Final = ("float32", "float16", "bfloat16")

Shape: TypeAlias = Sequence[int | None]


@dataclass(frozen=True, slots=True)
class Array:
    """A dense tensor of an answer, row-major: its dtype by name, its shape, and its bytes, little-endian."""

    dtype: str
    """bfloat16, float16, float32 or int32."""
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @classmethod
    def read(cls, message: tensor_pb2.Tensor, *, peer: str) -> Array:
        """The tensor of a `peer`'s answer. Raises Internal for one that does not hold what it says."""
        dtype = _NAMES.get(message.dtype, "")
        shape = tuple(message.shape)
        data = message.data
        if not dtype or min(shape, default=0) < 0 or len(data) != prod(shape) * _ITEM_BYTES[dtype]:
            raise Internal(
                f"the {peer} answered with a tensor of {len(data)} bytes, dtype {message.dtype}, "
                f"shape {shown(shape)}"
            )
        return cls(dtype, shape, data)

    def numpy(self) -> npt.NDArray[Any]:
        """As a numpy array, read-only, without a copy; of bfloat16, which numpy lacks, exactly as float32."""
        import numpy as np

        if self.dtype == "bfloat16":
            upper = np.frombuffer(self.data, "<u2").astype("<u4")  # a float32's upper half
            widened = (upper << 16).view("<f4").reshape(self.shape)
            widened.setflags(write=False)
            return widened
        kind = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}[self.dtype]
        return np.frombuffer(self.data, kind).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """As a torch tensor on the CPU, of the same dtype, in memory of its own."""
        import torch

        kind: torch.dtype = getattr(torch, self.dtype)
        if not self.data:
            return torch.empty(self.shape, dtype=kind)
        return torch.frombuffer(bytearray(self.data), dtype=kind).reshape(self.shape)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """For `np.asarray`."""
        import numpy as np

        return np.array(self.numpy(), dtype=dtype, copy=copy)


ArrayLike: TypeAlias = "Array | np.ndarray[Any, Any] | torch.Tensor"
"""What a caller may send: an answer's `Array`, a numpy array, or a torch tensor on any device."""


def to_wire(
    value: ArrayLike,
    *,
    name: str,
    shape: Shape | None = None,
    dtypes: Collection[str] = FLOATS,
    as_float32: bool = False,
) -> tensor_pb2.Tensor:
    """A caller's tensor as bytes, once its dtype and shape are as expected; None in `shape` is a free extent.

    `as_float32` widens 16-bit floats, which is exact. A tensor on a GPU is moved. Raises InvalidInput naming
    the argument `name`, what it holds and what was expected, before anything is copied.
    """
    dtype = _dtype_of(value, name)
    if dtype not in dtypes:
        raise InvalidInput(f"dtype is {dtype}, expected {' or '.join(dtypes)}", field=name)
    extents = tuple(int(extent) for extent in value.shape)
    if shape is not None and not _fits(extents, shape):
        raise InvalidInput(f"shape is {shown(extents)}, expected {shown(shape)}", field=name)
    if as_float32 and dtype != "float32":
        value, dtype = _widened(value), "float32"
    data = _bytes_of(value)
    return tensor_pb2.Tensor(dtype=WIRE_DTYPES[dtype], shape=extents, data=data)


def shown(shape: Shape) -> str:
    """`(196, *)`: a shape for people, free extents as a star; a stranger's may have any rank."""
    extents = ["*" if extent is None else str(extent) for extent in shape[:8]]
    return "(" + ", ".join(extents + ["…"] * (len(shape) > 8)) + ")"


def _fits(extents: Sequence[int], shape: Shape) -> bool:
    return len(extents) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, extents, strict=True)
    )


def _dtype_of(value: ArrayLike, name: str) -> str:
    """The name of its dtype. Raises InvalidInput for what is no tensor."""
    if isinstance(value, Array):
        return value.dtype
    if _is_torch(value):
        return str(value.dtype).removeprefix("torch.")
    dtype: Any = getattr(value, "dtype", None)
    if hasattr(dtype, "name") and hasattr(value, "tobytes") and hasattr(value, "shape"):
        return str(dtype.name)
    raise InvalidInput(
        f"got {type(value).__name__}, expected a numpy array, a torch tensor or an Array", field=name
    )


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")  # whoever has such a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _widened(value: Any) -> Any:
    """The same numbers as float32: of torch, and of numpy, whose bfloat16 is of a package of its own."""
    if isinstance(value, Array):
        return value.numpy().astype("<f4")
    return value.float() if _is_torch(value) else value.astype("<f4")


def _bytes_of(value: Any) -> bytes:
    """The elements, row-major and little-endian."""
    if isinstance(value, Array):
        return value.data
    if _is_torch(value):
        flat = value.detach().cpu().contiguous().flatten()
        data: bytes = flat.view(sys.modules["torch"].uint8).numpy().tobytes() if flat.numel() else b""
        return data
    if getattr(value.dtype, "byteorder", "=") == ">" or (
        sys.byteorder == "big" and getattr(value.dtype, "byteorder", "=") == "="
    ):
        value = value.astype(value.dtype.newbyteorder("<"))
    data = value.tobytes()
    return data
