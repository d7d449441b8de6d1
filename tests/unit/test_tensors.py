"""Tensors on the wire: bit for bit there and back, and every message that lies about itself refused."""

from __future__ import annotations

import math
import resource

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiprune.errors import InvalidInput
from hiprune.tensors import FLOATS, TORCH_DTYPES, check, from_proto, take_rows, to_proto
from hiprune.v1 import tensor_pb2

DTYPES = list(TORCH_DTYPES.values())
ALL = frozenset(DTYPES)
SHAPES = [(1,), (7,), (1, 1), (3, 5), (0,), (0, 5), (5, 0), (0, 0)]


def any_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits: every NaN payload, infinity and denormal may occur."""
    size = math.prod(shape) * dtype.itemsize
    data = np.random.default_rng(seed).bytes(size)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def message(dtype: int = tensor_pb2.DATA_TYPE_F32, shape=(2, 3), data: bytes = bytes(24)):
    return tensor_pb2.Tensor(dtype=dtype, shape=list(shape), data=data)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_round_trip_is_bit_exact(dtype, shape):
    tensor = any_bits(dtype, shape)
    wire = tensor_pb2.Tensor.FromString(to_proto(tensor).SerializeToString())
    back = from_proto(wire, field="x", shape=(None,) * len(shape), dtypes=ALL)
    assert back.dtype == dtype
    assert back.shape == shape
    assert bits(back) == bits(tensor)


def test_a_view_travels_as_what_it_shows():
    table = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    for view in (table.T, table[:, ::2], table[1:3], table[:, 0], torch.ones(1, 3).expand(4, 3)):
        wire = to_proto(view)
        assert torch.equal(from_proto(wire, field="x", shape=(None,) * view.dim()), view)


def test_elements_are_little_endian_and_row_major():
    wire = to_proto(torch.tensor([[1, 2], [3, 0x01020304]], dtype=torch.int32))
    assert wire.data == bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 3, 2, 1])


def test_a_received_tensor_owns_its_memory():
    wire = to_proto(torch.zeros(4))
    tensor = from_proto(wire, field="x", shape=(4,))
    tensor += 1
    assert torch.equal(from_proto(wire, field="x", shape=(4,)), torch.zeros(4))


def test_a_tensor_with_a_gradient_travels_without_it():
    weights = torch.ones(3, requires_grad=True)
    assert not from_proto(to_proto(weights), field="x", shape=(3,)).requires_grad


REFUSALS = {
    "unspecified dtype": (message(dtype=0), {}, "x.dtype", "dtype is DATA_TYPE_UNSPECIFIED"),
    "unknown dtype": (message(dtype=99), {}, "x.dtype", "dtype is 99"),
    "unwanted dtype": (message(dtype=tensor_pb2.DATA_TYPE_I32), {}, "x.dtype", "dtype is DATA_TYPE_I32"),
    "rank 0": (message(shape=(), data=bytes(4)), {}, "x.shape", r"rank is 0 \(shape \(\)\), expected 2"),
    "rank 1": (message(shape=(6,)), {}, "x.shape", "rank is 1"),
    "rank 3": (message(shape=(1, 2, 3)), {}, "x.shape", "rank is 3"),
    "no bytes, and strides of more than 64 bits": (
        message(shape=(0, 2**62, 2), data=b""),
        {"shape": (None,) * 3},
        "x.shape",
        r"shape is \(0, 4611686018427387904, 2\), whose extents other than 0 multiply to more than",
    ),
    "negative extent": (message(shape=(-2, 3)), {}, "x.shape", r"shape is \(-2, 3\), expected \(\*, \*\)"),
    "two negative extents": (message(shape=(-2, -3)), {}, "x.shape", r"shape is \(-2, -3\)"),
    "wrong extent": (message(), {"shape": (None, 4)}, "x.shape", r"shape is \(2, 3\), expected \(\*, 4\)"),
    "no payload": (
        tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[2, 3]),
        {},
        "x.data",
        "has no payload, expected 24 bytes",
    ),
    "one byte short": (message(data=bytes(23)), {}, "x.data", "holds 23 bytes, expected 24"),
    "one byte long": (message(data=bytes(25)), {}, "x.data", "holds 25 bytes, expected 24"),
    "empty data": (message(data=b""), {}, "x.data", "holds 0 bytes, expected 24"),
    "data for no rows": (message(shape=(0, 3)), {}, "x.data", "holds 24 bytes, expected 0"),
    "half the item size": (message(dtype=tensor_pb2.DATA_TYPE_F16), {}, "x.data", "expected 12"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_message_that_lies_is_refused_by_its_field_value_and_bound(case):
    wire, how, field, text = REFUSALS[case]
    with pytest.raises(InvalidInput, match=text) as caught:
        from_proto(wire, field="x", **{"shape": (None, None), **how})
    assert caught.value.field == field
    with pytest.raises(InvalidInput, match=text):
        check(wire, field="x", **{"shape": (None, None), **how})


@pytest.mark.parametrize("shape", [(2**40, 2**20), (2**62, 2**62), (2**63 - 1, 1)], ids=str)
def test_a_huge_claim_is_refused_without_an_allocation(shape):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidInput, match=r"holds 4 bytes, expected \d{13,}"):
        from_proto(message(shape=shape, data=bytes(4)), field="x", shape=(None, None))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_shape_of_very_many_extents_makes_a_short_message():
    wire = message(shape=[1] * 100_000, data=bytes(4))
    with pytest.raises(InvalidInput, match="rank is 100000") as caught:
        check(wire, field="x", shape=(None, None))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
def test_what_is_not_finite_is_refused_where_numbers_are_needed_and_named(dtype, value):
    tensor = torch.zeros(2, 3, dtype=dtype)
    tensor[1, 1] = value
    with pytest.raises(InvalidInput, match=f"element 4 is {value}") as caught:
        from_proto(to_proto(tensor), field="views[0].scores", shape=(None, None), finite=True)
    assert caught.value.field == "views[0].scores"
    assert bits(from_proto(to_proto(tensor), field="x", shape=(2, 3))) == bits(tensor)


@given(st.data())
def test_kept_rows_are_those_of_torch_in_every_dtype(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, channels = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 5))
    kept = data.draw(st.lists(st.integers(0, rows - 1), unique=True).map(sorted) if rows else st.just([]))
    table = any_bits(dtype, (rows, channels), seed=data.draw(st.integers(0, 2**32)))
    taken = take_rows(to_proto(table), np.array(kept, dtype=np.int64))
    expected = table.index_select(0, torch.tensor(kept, dtype=torch.int64))
    assert bits(from_proto(taken, field="x", shape=(len(kept), channels), dtypes=ALL)) == bits(expected)
