"""Cache records: what comes out is what went in under this key and secret, or DamagedRecord; nothing else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiprune.v1 import encoder_service_pb2, pruner_service_pb2, tensor_pb2
from services.pruner.records import MAGIC, DamagedRecord, pack, unpack

KEY = b"hiprune:v1:tenant:e:entry"
SECRET = bytes(range(32))
KIND = encoder_service_pb2.EncodeImageResponse


def image(width: int = 3) -> KIND:
    features = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F16, shape=[2, width], data=bytes(4 * width))
    view = encoder_service_pb2.View(features=features, grid_height=1, grid_width=2)
    return KIND(views=[view], fingerprint=encoder_service_pb2.ModelFingerprint(family="llava"))


RECORD = pack(image(), key=KEY, secret=SECRET)


def is_damaged(value: bytes, *, key: bytes = KEY, secret: bytes = SECRET, kind=KIND) -> bool:
    try:
        unpack(value, kind, key=key, secret=secret)
    except DamagedRecord:
        return True
    return False


def test_a_record_comes_back_as_it_was():
    for message in (image(), image(1000), KIND()):
        assert unpack(pack(message, key=KEY, secret=SECRET), KIND, key=KEY, secret=SECRET) == message


def test_a_record_begins_with_its_version():
    assert RECORD.startswith(MAGIC)
    assert is_damaged(b"HPR1" + RECORD[4:])


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_corrupted_byte_is_damage(flip):
    for place in range(len(RECORD)):
        damaged = bytearray(RECORD)
        damaged[place] ^= flip
        assert is_damaged(bytes(damaged)), f"byte {place}"


def test_every_truncation_and_every_addition_is_damage():
    for length in range(len(RECORD)):
        assert is_damaged(RECORD[:length]), f"{length} bytes"
        assert is_damaged(RECORD[length + 1 :]), f"without the first {length + 1} bytes"
    for more in (b"\0", RECORD, b"\x0a\x00"):
        assert is_damaged(RECORD + more)


def test_another_key_is_damage():
    for key in (b"", KEY + b"x", KEY[:-1], KEY.replace(b":e:", b":p:"), KEY.replace(b"tenant", b"tenanu")):
        assert is_damaged(RECORD, key=key)


def test_a_key_and_a_body_cannot_be_cut_differently():
    body = RECORD[32:]
    for cut in (1, 5, 20):
        moved = RECORD[:32] + body[cut:]
        assert is_damaged(moved, key=KEY + body[:cut])
        assert is_damaged(RECORD[:32] + KEY[-cut:] + body, key=KEY[:-cut])


def test_another_tenants_secret_is_damage():
    for secret in (bytes(32), SECRET[::-1], SECRET[:-1], SECRET + b"\0", b""):
        assert is_damaged(RECORD, secret=secret)


def test_bytes_of_another_kind_under_the_right_checksum_are_damage_or_a_message():
    text = pack(pruner_service_pb2.PruneImageRequest(question="x" * 50), key=KEY, secret=SECRET)
    with contextlib.suppress(DamagedRecord):
        unpack(text, KIND, key=KEY, secret=SECRET)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise_anything_else(value):
    assert is_damaged(value)
    assert is_damaged(MAGIC + value)


@given(st.data())
def test_no_damage_to_a_record_raises_anything_else(data):
    start = data.draw(st.integers(0, len(RECORD)))
    stop = data.draw(st.integers(start, len(RECORD)))
    damaged = RECORD[:start] + data.draw(st.binary(max_size=30)) + RECORD[stop:]
    assert is_damaged(damaged) == (damaged != RECORD)
