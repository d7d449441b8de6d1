"""Whatever bytes arrive as images, tensors, cache values or requests: read, or refused as they should be."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from pydantic import SecretStr

from hiprune import tenants, tensors
from hiprune.config import ConfigError, ServiceSettings
from hiprune.errors import InvalidInput
from hiprune.intake import MAX_FIELDS, check_fields
from hiprune.v1 import encoder_service_pb2, llm_service_pb2, pruner_service_pb2, tensor_pb2
from services.encoder.images import ImageLimits, decode_image, inspect
from services.encoder.settings import Settings as EncoderSettings
from services.llm.settings import Settings as LlmSettings
from services.pruner import records
from services.pruner.settings import Settings as PrunerSettings
from tests.fuzz.amounts import INPUTS, amounts, tried_on
from tests.fuzz.files import broken_files, whole_files
from tests.fuzz.memory import memory_of
from tests.fuzz.messages import broken_bytes, messages, unknown_fields

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=250_000, max_side=70_000)
REASONS = {"LIMIT_EXCEEDED", "IMAGE_UNREADABLE", "MISSING_FIELD"}


def refused(error: InvalidInput, fields: set[str], reasons: set[str]) -> None:
    """An error names a field, gives a reason, and does not go on about it."""
    assert error.field in fields
    assert error.reason in reasons
    assert len(error.message) < 200


def test_ten_thousand_inputs_are_tried() -> None:
    assert sum(INPUTS.values()) >= 10_000


@amounts
def test_any_file_is_an_image_within_limits_or_refused_by_name(
    amount: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = ImageFile.ImageFile.load_prepare

    def within_limits(image: ImageFile.ImageFile) -> None:
        if image.width * image.height > LIMITS.max_pixels:
            pytest.fail(f"pixels for {image.size} are allocated")
        allocate(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", within_limits)
    with memory_of() as memory, warnings.catch_warnings():
        warnings.simplefilter("error")  # the log is not a stranger's to fill

        @tried_on("image files", amount)
        @given(broken_files())
        def claim(data: bytes) -> None:
            try:
                image = decode_image(data, limits=LIMITS, field="media.image")
            except InvalidInput as error:
                refused(error, {"media.image"}, REASONS)
                return
            assert (image.mode, image.info) == ("RGB", {})
            assert image.size == inspect(data, limits=LIMITS, field="media.image").upright_size
            assert image.width * image.height <= LIMITS.max_pixels
            assert max(image.size) <= LIMITS.max_side
            assert len(image.tobytes()) == 3 * image.width * image.height

        claim()
    assert memory.grew < 150 * 2**20


def test_the_files_that_are_broken_are_right_before() -> None:
    for data in whole_files():
        assert isinstance(decode_image(data, limits=LIMITS, field="media.image"), Image.Image)


EXTENTS = st.sampled_from([0, 1, 2, 3, 4, 6, 196, -1, -(2**63), 2**31, 2**32, 2**62, 2**63 - 1])
DTYPES = st.sampled_from([0, 1, 2, 3, 4, 4, 3, 5, 99, -1])


@st.composite
def wire_tensors(draw: Any) -> tensor_pb2.Tensor:
    """Tensors whose payload fits, or not, and whose numbers are of every kind."""
    shape = draw(st.lists(EXTENTS | st.integers(0, 20), max_size=draw(st.sampled_from([2, 2, 4]))))
    dtype = draw(DTYPES)
    size = math.prod(shape) * {1: 2, 2: 2, 3: 4, 4: 4}.get(dtype, 1)
    message = tensor_pb2.Tensor(dtype=dtype, shape=shape)
    if 0 <= size <= 4096 and draw(st.booleans()):
        pattern = draw(st.binary(min_size=1, max_size=8))
        message.data = (pattern * (size // len(pattern) + 1))[:size]
    elif draw(st.booleans()):
        message.data = draw(st.binary(max_size=64))
    elif draw(st.booleans()):
        message.shared_memory.segment = draw(
            st.sampled_from(["", "hiprune-0", "../etc/passwd", "/dev/shm/x"])
        )
        message.shared_memory.offset = draw(st.sampled_from([0, 1, 64, -64, 2**62]))
    return message


EXPECTED = st.lists(st.sampled_from([None, 0, 1, 3, 196]), min_size=1, max_size=3)


@st.composite
def expectations(draw: Any, message: tensor_pb2.Tensor) -> list[int | None]:
    """A shape that a receiver may expect; more often one that the message has."""
    if draw(st.integers(0, 3)) == 0:
        return draw(EXPECTED)
    return [draw(st.sampled_from([None, extent])) for extent in message.shape]


@amounts
def test_any_tensor_is_read_as_it_was_sent_or_refused_by_name(amount: str) -> None:
    with memory_of() as memory:

        @tried_on("tensors", amount)
        @given(wire_tensors(), st.booleans(), st.data())
        def claim(message: tensor_pb2.Tensor, finite: bool, data: st.DataObject) -> None:
            shape = data.draw(expectations(message))
            try:
                tensor = tensors.from_proto(message, field="t", shape=shape, finite=finite)
            except InvalidInput as error:
                refused(error, {"t", "t.dtype", "t.shape", "t.data", "t.shared_memory"}, {"INVALID_FIELD"})
                return
            assert list(tensor.shape) == list(message.shape)
            assert tensors.to_proto(tensor).data == message.data
            assert not finite or bool(torch.isfinite(tensor).all())
            assert all(want in (None, got) for want, got in zip(shape, message.shape, strict=True))
            if len(shape) == 2 and 0 < message.shape[0] <= 1000:
                rows = np.arange(0, message.shape[0], 2)
                kept = tensors.take_rows(message, rows)
                assert list(kept.shape) == [len(rows), message.shape[1]]
                expected = tensor[torch.from_numpy(rows)]
                assert kept.data == tensors.to_proto(expected).data

        claim()
    assert memory.grew < 50 * 2**20


KINDS = (
    encoder_service_pb2.EncodeImageResponse,
    pruner_service_pb2.PrunedMedia,
    pruner_service_pb2.PruneTokensRequest,
)


@amounts
def test_a_damaged_cache_value_is_a_miss_and_nothing_else(amount: str) -> None:
    key, secret = b"key", b"s" * 32

    @tried_on("cache values", amount)
    @given(st.sampled_from(KINDS).flatmap(messages), st.data())
    def claim(message: Any, data: st.DataObject) -> None:
        value = records.pack(message, key=key, secret=secret)
        kept = records.unpack(value, type(message), key=key, secret=secret)
        assert kept.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)
        damaged = data.draw(broken_bytes(value))
        if damaged == value:
            return
        for bytes_, own_key, own_secret in (
            (damaged, key, secret),
            (value, b"other", secret),
            (value, key, b"t" * 32),
        ):
            with pytest.raises(records.DamagedRecord):
                records.unpack(bytes_, type(message), key=own_key, secret=own_secret)

    claim()


REQUESTS = (
    llm_service_pb2.AskImageRequest,
    llm_service_pb2.GenerateTextRequest,
    pruner_service_pb2.PruneTokensRequest,
    encoder_service_pb2.EncodeImageRequest,
)


@amounts
def test_counting_fields_agrees_with_the_parser(amount: str) -> None:
    @tried_on("requests before they are parsed", amount)
    @given(
        st.sampled_from(REQUESTS).flatmap(lambda kind: st.tuples(st.just(kind), messages(kind))), st.data()
    )
    def claim(chosen: tuple[Any, Any], data: st.DataObject) -> None:
        kind, message = chosen
        whole = message.SerializeToString() + data.draw(unknown_fields())
        check_fields(whole, kind.DESCRIPTOR, most=MAX_FIELDS)
        kind.FromString(whole)
        broken = data.draw(broken_bytes(whole) | st.binary(max_size=40))
        try:
            check_fields(broken, kind.DESCRIPTOR, most=MAX_FIELDS)
        except InvalidInput:  # then the parser refuses it too
            with pytest.raises(DecodeError):
                kind.FromString(broken)

    claim()


SETTINGS = (EncoderSettings, PrunerSettings, LlmSettings)
SECRET = "unspeakable-0123456789"
VALUES = st.sampled_from(
    [
        *("", " ", "0", "1", "-1", "1e3", "1_000", "inf", "nan", "true", "0x10", "9" * 40, "9" * 5000, "١"),
        *(
            "unix:",
            "unix:/x",
            "[::1]:1",
            "127.0.0.1:0",
            "127.0.0.1:65536",
            "0.0.0.0:1",
            ":1",
            "x:1",
            "host:²",
        ),
        *("cpu", "cuda:0", "auto", "float16", "redis", "off", "none", "../..", "{}", "\n", "é", "\udc80"),
    ]
) | st.text(max_size=12)


@amounts
def test_any_settings_are_read_or_refused_in_one_line_without_secrets(amount: str) -> None:
    @tried_on("settings", amount)
    @given(st.sampled_from(SETTINGS), st.data())
    def claim(kind: type[ServiceSettings], data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(kind.model_fields)), max_size=5, unique=True))
        secrets = {name for name, field in kind.model_fields.items() if field.annotation is SecretStr}
        values = {name: SECRET if name in secrets else data.draw(VALUES) for name in names}
        environ = {f"{kind.env_prefix}{name.upper()}": value for name, value in values.items()}
        try:
            read = kind.read([], environ)
        except ConfigError as error:
            shown, named = str(error), tuple(kind.model_fields)
        else:
            shown, named = repr(read), ("",)
        assert SECRET not in shown
        assert any(name in shown for name in named)

    claim()


TENANTS = f"""
tenants:
  alice:
    keys:
    - {{id: {"ab" * 8}, salt: {"cd" * 16}, sha256: {"ef" * 32}, created: 2026-11-22}}
    limits: {{requests_per_minute: 60, tokens_per_minute: 9000, concurrency: 4, max_image_pixels: 100}}
    policy: {{method: hiprune++, keep_ratio: 0.5, alpha: 0.1, object_layer: 3}}
  bob: {{}}
"""
NODES = st.sampled_from(
    [
        *("!!bool maybe", "!!timestamp soon", "!!binary é", "!!float x", "!!int x", "!!null x", "!!set {a}"),
        *("!!python/object/apply:os.system [true]", "!what x", "*a", "&a [1]", "<<: {a: 1}", "{a: 1, a: 2}"),
        *("2026-13-45", "2026-11-22T99:99:99Z", ".nan", "-.inf", "1e999", "0x1f", "1:60:99", "9" * 5000),
        *(
            "{",
            "}",
            "[",
            "- -",
            "? x",
            ": :",
            "|",
            ">",
            "'",
            '"\\x"',
            "\t",
            "\0",
            "\ufeff",
            "#",
            "---",
            "...",
        ),
        *("~", "yes", "0", "-1", str(2**31), str(2**63), "1.5", "''", "[]", "[[[]]]", "[" * 3000),
    ]
)


def test_the_tenants_file_that_is_broken_is_right_before() -> None:
    assert set(tenants.parse(TENANTS, "FILE").tenants) == {"alice", "bob"}


@st.composite
def tenants_files(draw: Any) -> str:
    """A right file, some words of which are other ones, or some letters."""
    words = re.split(r"(\s+|[{}:,]+)", TENANTS)
    for _ in range(draw(st.integers(0, 3))):
        places = [place for place, word in enumerate(words) if word.strip(" \n{}:,-")]
        words[draw(st.sampled_from(places))] = draw(NODES)
    text = "".join(words).encode("utf-8", "replace")
    return (draw(broken_bytes(text)) if draw(st.booleans()) else text).decode("utf-8", "replace")


@amounts
def test_any_tenants_file_is_read_or_refused_in_words(amount: str) -> None:
    @tried_on("tenants files", amount)
    @given(tenants_files())
    def claim(text: str) -> None:
        try:
            content = tenants.parse(text, "FILE")
        except ConfigError as error:
            shown = str(error)
        else:
            shown = "FILE"
            assert len(tenants.of_file(content).by_name) == len(content.tenants)
        assert shown.startswith("FILE")
        assert len(shown) < 3000

    claim()
