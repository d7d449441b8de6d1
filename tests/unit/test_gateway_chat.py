"""How a chat request of OpenAI's API is read, and what each of its fields becomes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from contextlib import suppress

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError

from hiprune.errors import HipruneError, InvalidInput, Unsupported
from hiprune.v1 import llm_service_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from services.gateway import chat, images
from services.gateway.chat import read_chat, to_request
from services.gateway.naming import Naming

USER = {"role": "user", "content": "?"}
PNG = base64.b64encode(b"an image").decode()


def body(*messages: object, **fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": list(messages) or [USER], **fields}).encode()


def asked(**fields: object) -> llm_service_pb2.AskImageRequest:
    return to_request(read_chat(body(**fields)), [])


def refusal(raw: bytes) -> HipruneError:
    with pytest.raises((InvalidInput, Unsupported)) as refused:
        to_request(read_chat(raw), [b""] * 9)
    return refused.value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}),
        ({"temperature": 0, "top_p": 1}, {"temperature": 0.0, "top_p": 1.0}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"], "seed": -1}, {"stop": ["a", "b"], "seed": -1}),
        ({"stop": None, "seed": None, "temperature": None, "max_tokens": None}, {}),
    ],
)
def test_sampling_is_passed_on_and_what_is_unset_stays_unset(fields, expected):
    assert asked(**fields).sampling == llm_service_pb2.Sampling(**expected)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0.25, {"keep_ratio": 0.25}),
        (1, {"keep_ratio": 1.0}),
        (1.0, {"keep_ratio": 1.0}),
        (2, {"keep_count": 2}),
        (65.0, {"keep_count": 65}),
        ("1/4", {"keep_ratio": 0.25}),
        ("25%", {"keep_ratio": 0.25}),
        ("0.25", {"keep_ratio": 0.25}),
        ("65", {"keep_count": 65}),
        ("1", {"keep_count": 1}),
        (10**30, {"keep_count": 2**31 - 1}),
    ],
)
def test_a_budget_is_a_share_or_a_count(keep, expected):
    assert asked(pruning={"keep": keep}).policy == pb.PrunePolicy(**expected)


@pytest.mark.parametrize("keep", [1.5, "a third", "1/0", "", "1/2/3", True, [1], {}])
def test_a_budget_that_is_neither_is_refused(keep):
    assert refusal(body(pruning={"keep": keep})).field == "pruning.keep"


def test_pruning_is_passed_on():
    policy = asked(
        pruning={
            "method": "random",
            "alpha": 0,
            "beta": 0.5,
            "object_layer": 2,
            "buffer": "rotated_cross",
            "text_budget": "additive",
        }
    ).policy
    assert policy == pb.PrunePolicy(
        method=pb.METHOD_RANDOM,
        alpha=0.0,
        beta=0.5,
        object_layer=2,
        buffer=pb.BUFFER_SHAPE_ROTATED_CROSS,
        text_budget=pb.TEXT_BUDGET_ADDITIVE,
    )
    assert policy.HasField("alpha")
    assert not asked().HasField("policy")


def test_every_method_has_a_word():
    assert {*chat.METHODS.values(), pb.METHOD_UNSPECIFIED} == set(pb.Method.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"tools": []},
        {"tools": None, "tool_choice": "none"},
        {"logprobs": False},
        {"response_format": {"type": "text"}},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"user": "somebody", "metadata": {"a": "b"}, "store": False},
        {"stream": False, "stream_options": None},
    ],
)
def test_parameters_that_ask_for_nothing_are_passed_over(fields):
    assert asked(**fields) == asked()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"logprobs": True},
        {"top_logprobs": 3},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"5": 1}},
        {"modalities": ["text", "audio"]},
    ],
)
def test_parameters_that_would_change_the_answer_are_refused_by_name(fields):
    error = refusal(body(**fields))
    assert type(error) is Unsupported
    assert [error.field] == list(fields)


@pytest.mark.parametrize(
    ("raw", "field", "reason"),
    [
        (b"", "", "INVALID_JSON"),
        (b"{", "", "INVALID_JSON"),
        (b"[]", "", "INVALID_JSON"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "", "INVALID_JSON"),
        (b"\xff", "", "INVALID_JSON"),
        (b'{"model": "m", "messages": ' + b"[" * 50_000, "", "INVALID_JSON"),
        (b'{"model": "m", "messages": ' + b"[" * 100_000, "", "LIMIT_EXCEEDED"),
        (body(*[USER] * 10_001), "messages", "LIMIT_EXCEEDED"),
        (body(stop=["a"] * 10_001), "stop", "LIMIT_EXCEEDED"),
        (
            body({"role": "user", "content": [{"type": "text", "text": ""}] * 10_001}),
            "messages[0].content",
            "LIMIT_EXCEEDED",
        ),
        (b"{}", "model", "MISSING_FIELD"),
        (body(model=""), "model", "MISSING_FIELD"),
        (body(model=5), "model", "INVALID_FIELD"),
        (body(messages="hello"), "messages", "INVALID_FIELD"),
        (body({"content": "?"}), "messages[0].role", "MISSING_FIELD"),
        (body({"role": "tool", "content": "?"}), "messages[0].role", "INVALID_FIELD"),
        (body(USER, {"role": "user", "content": 5}), "messages[1].content", "INVALID_FIELD"),
        (body({"role": "user", "content": [5]}), "messages[0].content[0]", "INVALID_FIELD"),
        (
            body({"role": "user", "content": [{"type": "input_audio"}]}),
            "messages[0].content[0]",
            "INVALID_FIELD",
        ),
        (
            body({"role": "user", "content": [{"type": "text"}]}),
            "messages[0].content[0].text",
            "MISSING_FIELD",
        ),
        (
            body({"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}),
            "messages[0].content[0].image_url.url",
            "INVALID_FIELD",
        ),
        (
            body({"role": "assistant", "content": None, "tool_calls": [{}]}),
            "messages[0].tool_calls",
            "UNSUPPORTED",
        ),
        (body(temperature="hot"), "temperature", "INVALID_FIELD"),
        (body(temperature=True), "temperature", "INVALID_FIELD"),
        (body(max_tokens="5"), "max_tokens", "INVALID_FIELD"),
        (body(max_tokens=1.5), "max_tokens", "INVALID_FIELD"),
        (body(max_tokens=2**31), "max_tokens", "INVALID_FIELD"),
        (body(seed=2**63), "seed", "INVALID_FIELD"),
        (body(stop=5), "stop", "INVALID_FIELD"),
        (body(stop=["a", 5]), "stop[1]", "INVALID_FIELD"),
        (body(stream="yes"), "stream", "INVALID_FIELD"),
        (body(pruning={"method": "best"}), "pruning.method", "INVALID_FIELD"),
        (body(pruning={"keap": 3}), "pruning.keap", "UNKNOWN_PARAMETER"),
        (body(prunning={}), "prunning", "UNKNOWN_PARAMETER"),
    ],
)
def test_what_is_wrong_is_named_as_the_client_wrote_it(raw, field, reason):
    error = refusal(raw)
    assert (error.field, error.reason) == (field, reason)


@pytest.mark.parametrize(
    "raw",
    [
        body(*[0] * 9000),
        body({"role": "user", "content": [0] * 9000}),
        body(stop=[0] * 9000),
        body(pruning={f"p{number}": 0 for number in range(9000)}),
    ],
    ids=["turns", "parts", "stop", "pruning"],
)
def test_of_many_things_that_are_wrong_one_becomes_an_error(raw):
    cause = refusal(raw).__cause__
    assert cause is None or (isinstance(cause, ValidationError) and cause.error_count() == 1)


@pytest.mark.parametrize("more", [b"0," * 100_000, b"[]," * 50_001, b"{}," * 50_001])
def test_a_body_of_too_many_values_is_not_parsed(more, monkeypatch):
    monkeypatch.setattr(chat.ChatRequest, "model_validate_json", None)
    raw = b'{"model": "m", "messages": [], "user": [' + more + b"0]}"
    assert refusal(raw).reason == "LIMIT_EXCEEDED"


def test_images_do_not_count_as_values():
    url = f"data:image/png;base64,{base64.b64encode(bytes(range(256)) * 4000).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    assert len(list(chat.images_of(read_chat(body({"role": "user", "content": [part]}))))) == 1


def test_base64_is_read_in_pieces_as_it_is_in_one(monkeypatch):
    monkeypatch.setattr(images, "_PIECE", 8)
    for size in range(30):
        data = bytes(range(size))
        assert (
            images.read_data_url(f"data:image/png;base64,{base64.b64encode(data).decode()}", "f", 99) == data
        )
    for text in ("AAAAAA==AAAA", "AAAAAAA=AAAA", "AAAAAAAAA", "AAAA====", "AAAAAAAA=", "AAAAAA=A"):
        with pytest.raises(InvalidInput):
            images.read_data_url(f"data:image/png;base64,{text}", "f", 99)


def test_an_error_does_not_repeat_what_the_client_wrote():
    for raw in (body(temperature="canary"), body({"role": "canary", "content": "?"}), b"canary"):
        assert "canary" not in str(refusal(raw))


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("messages", "messages"),
        ("messages[0].role", "messages[0].role"),
        ("messages[0].parts[0].text", "messages[0].content"),
        ("messages[0].parts", "messages[0].content"),
        ("messages[1].parts[1].media.image", "messages[1].content[1].image_url.url"),
        ("messages[1].parts[1].media", "messages[1].content[1].image_url.url"),
        ("messages[1].parts[0].text", "messages[1].content[0].text"),
        ("sampling.max_tokens", "max_tokens"),
        ("sampling.temperature", "temperature"),
        ("sampling.stop[0]", "stop"),
        ("policy.keep_ratio", "pruning.keep"),
        ("policy.keep_count", "pruning.keep"),
        ("policy.alpha", "pruning.alpha"),
        ("policy", "pruning"),
        ("model", "model"),
        ("something.else", "something.else"),
    ],
)
def test_fields_of_the_llms_errors_get_the_clients_names(field, expected):
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    naming = Naming.of(read_chat(body(USER, {"role": "user", "content": parts}, stop="x")))
    assert naming(field) == expected


def test_the_newer_name_of_max_tokens_is_kept_where_it_was_used():
    naming = Naming.of(read_chat(body(max_completion_tokens=5, stop=["a"])))
    assert naming("sampling.max_tokens") == "max_completion_tokens"
    assert naming("sampling.stop[0]") == "stop[0]"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "refusal", "input_audio"]) | JSON},
    optional={"text": st.text() | JSON, "image_url": st.fixed_dictionaries({"url": st.text()}) | JSON},
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON},
    optional={"content": st.text() | st.lists(PART, max_size=3) | JSON, "tool_calls": JSON},
)
FIELDS = [*chat.ChatRequest.model_fields, "n", "tools", "logprobs", "response_format", "nonsense"]
PRUNING = st.fixed_dictionaries({}, optional=dict.fromkeys([*chat.Pruning.model_fields, "more"], JSON))


@given(
    turns=st.lists(TURN, max_size=3) | JSON,
    pruning=PRUNING | JSON,
    more=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
@hypothesis.settings(max_examples=100)
def test_any_json_is_a_request_or_is_refused(turns, pruning, more):
    raw = json.dumps({"model": "m", "messages": turns, "pruning": pruning, **more}).encode()
    with suppress(InvalidInput, Unsupported):
        read = read_chat(raw)
        to_request(read, [b"x"] * len(list(chat.images_of(read))))


@given(st.binary(max_size=64))
def test_any_bytes_are_a_request_or_are_refused(raw):
    with pytest.raises((InvalidInput, Unsupported)):
        read_chat(raw)


@given(st.text(max_size=64), st.sampled_from(["", "data:", "data:image/png;base64,"]))
def test_any_text_is_a_file_or_is_refused(text, head):
    with suppress(InvalidInput):
        assert len(images.read_data_url(head + text, "f", 32)) <= 32


# --- data URLs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "image/gif", "IMAGE/PNG"])
def test_a_data_url_holds_a_file(kind):
    assert images.read_data_url(f"data:{kind};base64,{PNG}", "f", 8) == b"an image"


@pytest.mark.parametrize("size", range(1, 9))
def test_the_bound_of_a_file_is_met_to_the_byte(size):
    url = "data:image/png;base64," + base64.b64encode(bytes(size)).decode()
    assert len(images.read_data_url(url, "f", size)) == size
    with pytest.raises(InvalidInput, match=f"{size} bytes, expected at most {size - 1}"):
        images.read_data_url(url, "f", size - 1)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:", "INVALID_FIELD"),
        ("data:image/png;base64", "INVALID_FIELD"),
        (f"data:image/png,{PNG}", "INVALID_FIELD"),
        (f"data:text/html;base64,{PNG}", "INVALID_FIELD"),
        (f"data:image/svg+xml;base64,{PNG}", "INVALID_FIELD"),
        (f"data:image/png;charset=utf-8;base64,{PNG}", "INVALID_FIELD"),
        (f"data:{'a' * 99};base64,{PNG}", "INVALID_FIELD"),
        (f"data:image/png;base64,{PNG[:-1]}", "IMAGE_UNREADABLE"),
        (f"data:image/png;base64,{PNG}!", "IMAGE_UNREADABLE"),
        (f"data:image/png;base64, {PNG}", "IMAGE_UNREADABLE"),
        (f"data:image/png;base64,{PNG}\n", "IMAGE_UNREADABLE"),
        ("data:image/png;base64,é", "IMAGE_UNREADABLE"),
        (f"data:image/png;base64,{'A' * 400}", "LIMIT_EXCEEDED"),
        (f"data:image/png;base64,{'!' * 400}", "LIMIT_EXCEEDED"),  # its size is looked at first
    ],
)
def test_a_data_url_that_holds_none_is_refused(url, reason):
    with pytest.raises(InvalidInput) as refused:
        images.read_data_url(url, "f", 100)
    assert (refused.value.field, refused.value.reason) == ("f", reason)


def test_the_gateway_imports_neither_torch_nor_the_services_libraries():
    program = (
        "import services.gateway.process, sys; "
        "print(*({'torch', 'transformers', 'numpy', 'PIL', 'redis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
