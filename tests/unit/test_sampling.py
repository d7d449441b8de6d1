"""Claims about the wire's sampling: defaults, bounds, and the field that an error names."""

from __future__ import annotations

import math

import pytest

from hiprune.errors import InvalidInput
from hiprune.v1.llm_service_pb2 import Sampling
from services.llm.sampling import read_sampling

CEILING = 1024


def read(**fields):
    return read_sampling(Sampling(**fields), max_new_tokens=CEILING)


def test_nothing_set_is_greedy_with_the_documented_defaults():
    sampling = read()
    assert sampling.greedy
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0, 1, None, ())
    assert sampling.tokens_within(room=4096, ceiling=CEILING) == 256


def test_the_default_length_is_what_the_context_or_the_service_leaves():
    assert read().tokens_within(room=10, ceiling=CEILING) == 10
    assert read().tokens_within(room=4096, ceiling=100) == 100
    assert read(max_tokens=500).tokens_within(room=300, ceiling=CEILING) == 300
    assert read(max_tokens=500).tokens_within(room=4096, ceiling=CEILING) == 500


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1},
        {"max_tokens": CEILING},
        {"temperature": 0},
        {"temperature": 2},
        {"temperature": 1e-300},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"seed": 0},
        {"stop": ["x"] * 8},
        {"stop": ["x" * 64]},
        {"stop": ["…" * 64]},
    ],
    ids=str,
)
def test_every_bound_is_inside(fields):
    sampling = read(**fields)
    for name, value in fields.items():
        assert getattr(sampling, name) == (tuple(value) if name == "stop" else value)


def test_minus_zero_is_greedy():
    assert read(temperature=-0.0).greedy
    assert math.copysign(1, read(temperature=-0.0).temperature) == 1


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens", "INVALID_FIELD"),
        ({"max_tokens": -5}, "sampling.max_tokens", "INVALID_FIELD"),
        ({"max_tokens": CEILING + 1}, "sampling.max_tokens", "LIMIT_EXCEEDED"),
        ({"temperature": -0.1}, "sampling.temperature", "INVALID_FIELD"),
        ({"temperature": 2.0000001}, "sampling.temperature", "INVALID_FIELD"),
        ({"temperature": math.nan}, "sampling.temperature", "INVALID_FIELD"),
        ({"temperature": math.inf}, "sampling.temperature", "INVALID_FIELD"),
        ({"top_p": 0}, "sampling.top_p", "INVALID_FIELD"),
        ({"top_p": -1}, "sampling.top_p", "INVALID_FIELD"),
        ({"top_p": 1.0000001}, "sampling.top_p", "INVALID_FIELD"),
        ({"top_p": math.nan}, "sampling.top_p", "INVALID_FIELD"),
        ({"stop": ["x"] * 9}, "sampling.stop", "LIMIT_EXCEEDED"),
        ({"stop": ["x", ""]}, "sampling.stop[1]", "INVALID_FIELD"),
        ({"stop": ["x" * 65]}, "sampling.stop[0]", "INVALID_FIELD"),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_refused_by_name_with_the_bound(fields, field, reason):
    with pytest.raises(InvalidInput) as refused:
        read(**fields)
    assert (refused.value.field, refused.value.reason) == (field, reason)
    assert "expected" in refused.value.message
