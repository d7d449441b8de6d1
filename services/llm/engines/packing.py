"""Positions of a prompt as whole numbers of 30 bits, one for each of its tokens, and back.

vLLM hands a model that computes positions of its own nothing but the prompt's token ids (`SupportsMRoPE`). A
prompt of embeddings has none, so that is where its positions travel: (axes, S) numbers in room for S of them.
They fit since neighbours are alike: differences along the prompt, deflated. Knows no vLLM.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_BITS: Final = 30
"""Of each number: it stays positive as an int32, which is what vLLM keeps tokens in."""
_RAW: Final = -15
"""zlib's name for a stream without header and checksum."""


class DoNotFit(ValueError):
    """Positions too wild for the room that their prompt has."""


def pack(positions: npt.NDArray[np.int64]) -> list[int]:
    """S numbers in [0, 2^30) of positions (axes, S), each in [0, 2^31). Raises DoNotFit."""
    if positions.size == 0:
        return []
    if int(positions.min()) < 0 or int(positions.max()) >= 2**31:
        raise DoNotFit(f"positions lie in [{positions.min()}, {positions.max()}], expected [0, 2^31)")
    ahead = np.diff(positions, axis=1, prepend=0).astype("<i4")
    # all first bytes, then all second ones: the high ones are zeros and ones, which deflate to nothing
    planes = np.frombuffer(ahead.tobytes(), np.uint8).reshape(-1, 4).T
    deflate = zlib.compressobj(9, zlib.DEFLATED, _RAW)
    data = deflate.compress(planes.tobytes()) + deflate.flush()
    length = positions.shape[1]
    if 8 * len(data) > _BITS * length:
        raise DoNotFit(
            f"positions of {length} tokens take {8 * len(data)} bits, expected at most {_BITS} each"
        )
    bits = np.zeros(_BITS * length, np.uint8)
    bits[: 8 * len(data)] = np.unpackbits(np.frombuffer(data, np.uint8))
    weights = 1 << np.arange(_BITS, dtype=np.int64)[::-1]
    numbers: list[int] = (bits.reshape(length, _BITS) @ weights).tolist()
    return numbers


def unpack(numbers: Sequence[int], axes: int) -> npt.NDArray[np.int64]:
    """Positions (axes, S) of S numbers that `pack` made. Raises ValueError for others."""
    length = len(numbers)
    if length == 0:
        return np.zeros((axes, 0), np.int64)
    values = np.asarray(numbers, np.int64)
    bits = (values[:, None] >> np.arange(_BITS, dtype=np.int64)[::-1]) & 1
    data = np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()
    inflate = zlib.decompressobj(_RAW)
    size = 4 * axes * length
    try:
        planes = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"{length} numbers hold no packed positions: {error}") from error
    if len(planes) != size or not inflate.eof:
        raise ValueError(f"{length} numbers do not hold the positions of as many tokens")
    ahead = np.frombuffer(planes, np.uint8).reshape(4, -1).T.reshape(-1).view("<i4").reshape(axes, length)
    return ahead.astype(np.int64).cumsum(axis=1)
