"""The client library's surface, its arrays, and what it refuses before anything is sent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import hiprune
from hiprune import errors
from hiprune.arrays import Array, to_wire
from hiprune.policies import METHODS
from hiprune.tensors import from_proto
from hiprune.v1 import pruner_service_pb2 as pb
from hiprune.v1 import tensor_pb2

PUBLIC = {
    *("Answer", "Array", "Client", "Encoded", "EncodedView", "Pruned", "PrunedView", "Scores", "View"),
    *("policy", "sampling", "video"),
    *("Exhausted", "Expired", "HipruneError", "Internal", "InvalidInput", "Mismatch", "NotFound"),
    *("PermissionDenied", "Unauthenticated", "Unavailable", "Unsupported"),
}


# --- the surface -------------------------------------------------------------------------------------------


def test_the_public_names_are_these_and_each_is_there():
    assert set(hiprune.__all__) == PUBLIC
    assert set(dir(hiprune)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(hiprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hiprune.nothing  # noqa: B018


def test_every_exception_is_public_and_in_the_docstring_with_its_status():
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert len(kinds) > 10
    for kind in kinds:
        assert getattr(hiprune, kind.__name__) is kind
        if kind is not errors.HipruneError:
            assert f"{kind.__name__:<20} {kind.code.name}" in hiprune.__doc__


def test_importing_the_package_loads_nothing_and_the_client_neither_torch_nor_numpy():
    said = run(
        "import sys, hiprune; print([m for m in sys.modules if m.startswith(('hiprune.', 'grpc'))])\n"
        "from hiprune import *; client = Client(pruner='127.0.0.1:1')\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'transformers') if m in sys.modules])"
    )
    assert said == ["[]", "[]"]


def test_a_client_works_where_torch_and_numpy_are_not_installed():
    said = run(
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from hiprune import *; from hiprune.arrays import to_wire\n"
        "print(len(to_wire(Array('float32', (2,), bytes(8)), name='x').data))\n"
        "try: to_wire([1.0], name='x')\n"
        "except InvalidInput as error: print(error)"
    )
    assert said == ["8", "x: got list, expected a numpy array, a torch tensor or an Array"]


def run(program: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- policies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1 / 3, {"keep_ratio": 1 / 3}),
        (Fraction(1, 4), {"keep_ratio": 0.25}),
        (1, {"keep_ratio": 1.0}),
        (2, {"keep_count": 2}),
        ("1/3", {"keep_ratio": 1 / 3}),
        (" 33% ", {"keep_ratio": 0.33}),
        ("1e-1", {"keep_ratio": 0.1}),
        ("65", {"keep_count": 65}),
        (10**12, {"keep_count": 2**31 - 1}),
    ],
)
def test_a_budget_is_written_as_people_write_it(keep, expected):
    assert hiprune.policy(keep=keep) == pb.PrunePolicy(**expected)


def test_a_policy_has_every_field_of_the_wires():
    whole = hiprune.policy(
        "HiPrune++",
        keep=65,
        alpha=0.0,
        object_layer=3,
        beta=0.2,
        buffer="rotated_cross",
        text_budget="additive",
        scores=True,
    )
    fields = {"keep_ratio" if each.name == "keep_count" else each.name for each, _ in whole.ListFields()}
    assert fields | {"keep_count"} == {each.name for each in pb.PrunePolicy.DESCRIPTOR.fields}
    assert whole.method == pb.METHOD_HIPRUNE_PLUS_PLUS
    assert whole.HasField("alpha")  # zero is a value
    assert hiprune.policy() == pb.PrunePolicy()


def test_every_method_of_the_wire_has_a_name():
    assert set(METHODS.values()) | {0} == set(pb.Method.values())
    for name, number in METHODS.items():
        assert hiprune.policy(name).method == number


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        ({"method": "magic"}, "method", ("'magic'", "hiprune++")),
        ({"keep": "a third"}, "keep", ("'a third'", "33%")),
        ({"keep": 1.5}, "keep", ("1.5", "share")),
        ({"keep": True}, "keep", ("True",)),
        ({"keep": "1/0"}, "keep", ("1/0",)),
        ({"buffer": "round"}, "buffer", ("'round'", "flat")),
        ({"text_budget": "x"}, "text_budget", ("'x'", "inside")),
        ({"object_layer": 2**40}, "object_layer", (str(2**40),)),
        ({"alpha": "much"}, "alpha", ("much",)),
    ],
)
def test_a_policy_that_is_wrong_names_the_argument_and_the_value(arguments, field, words):
    with pytest.raises(errors.InvalidInput) as refused:
        hiprune.policy(**arguments)
    assert refused.value.field == field
    assert all(word in str(refused.value) for word in words)


def test_sampling_says_which_argument_is_wrong():
    assert list(hiprune.sampling(stop="end", temperature=0.0).stop) == ["end"]
    assert hiprune.sampling(temperature=0.0).HasField("temperature")
    with pytest.raises(errors.InvalidInput, match="seed"):
        hiprune.sampling(seed=2**80)


# --- arrays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_torch_tensor_crosses_bit_for_bit_as_the_services_read_it(dtype):
    sent = torch.randn(5, 3).to(dtype)
    message = to_wire(sent.t().contiguous().t(), name="x", shape=(5, None))  # not contiguous
    assert torch.equal(from_proto(message, field="x", shape=(5, 3)), sent)
    back = Array.read(message, peer="pruner")
    assert torch.equal(back.torch(), sent)
    assert back.torch().dtype == dtype
    assert np.array_equal(back.numpy(), sent.float().numpy().astype(back.numpy().dtype))
    assert not back.numpy().flags.writeable
    back.torch().zero_()
    assert torch.equal(back.torch(), sent)  # memory of its own


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f2"])
def test_a_numpy_array_crosses_in_either_byte_order(dtype):
    sent = np.arange(12, dtype=dtype).reshape(3, 4).T
    back = Array.read(to_wire(sent, name="x", shape=(4, 3)), peer="pruner")
    assert np.array_equal(back.numpy(), sent)
    assert np.array_equal(np.asarray(back), sent)
    assert np.array_equal(back.torch().numpy(), sent)


def test_numpys_bfloat16_is_widened_exactly():
    sent = torch.tensor([1.0, -0.0, 3.140625, 2.0**127, float("inf")], dtype=torch.bfloat16)
    found = Array.read(to_wire(sent, name="x"), peer="pruner").numpy()
    assert found.dtype == np.float32
    assert found.tobytes() == sent.float().numpy().tobytes()


def test_scores_of_16_bits_are_sent_as_float32():
    for scores in (torch.tensor([0.5, 3.25]).half(), np.array([0.5, 3.25], "f2")):
        message = to_wire(scores, name="x", shape=(2,), as_float32=True)
        assert message.dtype == tensor_pb2.DATA_TYPE_F32
        assert np.frombuffer(message.data, "<f4").tolist() == [0.5, 3.25]


def test_arrays_without_elements_cross():
    for empty in (torch.empty(0, 4), np.empty((0, 4), "f4")):
        back = Array.read(to_wire(empty, name="x"), peer="pruner")
        assert back.torch().shape == back.numpy().shape == (0, 4)


def test_an_answer_whose_tensor_is_no_tensor_is_the_services_fault():
    short = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[2, 2], data=bytes(15))
    with pytest.raises(errors.Internal, match=r"encoder answered.*15 bytes.*\(2, 2\)"):
        Array.read(short, peer="encoder")


# --- what is refused before it is sent ---------------------------------------------------------------------


def view(**changed) -> hiprune.View:
    return hiprune.View(**{"grid": (2, 3), "attention": {1: np.ones(6, "f4")}, **changed})


@pytest.mark.parametrize(
    ("views", "more", "field", "words"),
    [
        (view(features=np.ones((5, 4), "f4")), {}, "views[0].features", ("(5, 4)", "(6, *)")),
        (view(features=np.ones((6, 4))), {}, "views[0].features", ("float64", "float32")),
        (view(features=torch.ones(6, 4).int()), {}, "views[0].features", ("int32", "bfloat16")),
        (view(features=[[1.0]]), {}, "views[0].features", ("list", "numpy")),
        ([view(), view(attention={7: np.ones(4, "f4")})], {}, "views[1].attention[7]", ("(4)", "(6)")),
        (view(prefix_features=np.ones(6, "f4")), {}, "views[0].prefix_features", ("(6)", "(*, *)")),
        (view(grid=(0, 3)), {}, "views[0].grid", ("(0, 3)",)),
        (view(), {"text_vector": np.ones((2, 3), "f4")}, "text_vector", ("(2, 3)", "(1, *)")),
        (view(), {"similarity": []}, "similarity", ("0 vectors", "1 views")),
        (view(), {"similarity": [np.ones(5, "f4")]}, "similarity[0]", ("(5)", "(6)")),
        (view(), {"question": "?", "text_vector": np.ones(3, "f4")}, "text_vector", ("question",)),
        (view(), {"timeout_s": 0}, "timeout_s", ("0",)),
        (view(), {"timeout_s": 1e10}, "timeout_s", ("10000000000.0",)),
        (view(), {"timeout_s": "soon"}, "timeout_s", ("soon",)),
        (view(grid=(2.0, 3)), {}, "views[0].grid", ("(2.0, 3)", "whole numbers")),
        (view(grid=(2, 3, 1)), {}, "views[0].grid", ("(2, 3, 1)",)),
        (view(frame=2**40), {}, "views[0].frame", (str(2**40),)),
        (view(valid=(0, 0, 2)), {}, "views[0].valid", ("(0, 0, 2)",)),
        (view(valid=(0, 0, 2, 0.5)), {}, "views[0].valid.width", ("0.5",)),
        (view(attention={2**40: np.ones(6, "f4")}), {}, "views[0].attention: layer", (str(2**40),)),
        (view(), {"policy": "hiprune"}, "policy", ("'hiprune'",)),
        (view(), {"question": "\udcff"}, "question", ("udcff",)),
        (view(), {"deep_layer": "last"}, "deep_layer", ("'last'",)),
    ],
)
async def test_arrays_that_do_not_fit_are_refused_before_anything_is_sent(views, more, field, words):
    async with hiprune.Client(pruner="127.0.0.1:1") as client:
        with pytest.raises(errors.InvalidInput) as refused:  # nobody is there to refuse anything
            await client.prune_tokens(views, **more)
    assert refused.value.field == field
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("method", ["prune", "prune_tokens", "encode"])
async def test_a_method_whose_service_has_no_address_says_which_argument_is_missing(method):
    async with hiprune.Client() as client:
        with pytest.raises(errors.InvalidInput, match=f"`{method}` needs it: Client"):
            await getattr(client, method)(b"")


@pytest.mark.parametrize(
    ("method", "given", "more", "field"),
    [
        ("ask", "\udcff", {}, "question"),
        ("ask", "?", {"policy": "hiprune"}, "policy"),
        ("ask", "?", {"model": 1}, "model"),
        ("prune", b"x", {"question": "\udcff"}, "question"),
        ("prune", b"x", {"policy": "hiprune"}, "policy"),
        ("encode", b"x", {"layers": [2**40]}, "layers"),
        ("encode", b"x", {"layers": ["a"]}, "layers"),
    ],
)
async def test_what_the_wire_cannot_hold_is_refused_with_its_arguments_name(method, given, more, field):
    async with hiprune.Client("127.0.0.1:1", pruner="127.0.0.1:1", encoder="127.0.0.1:1") as client:
        with pytest.raises(errors.InvalidInput) as refused:
            await getattr(client, method)(given, **more)
    assert refused.value.field == field


def test_a_video_and_a_stop_that_the_wire_cannot_hold_are_refused():
    with pytest.raises(errors.InvalidInput, match="frames: got"):
        hiprune.video(["picture.png"])
    with pytest.raises(errors.InvalidInput, match="stop: got"):
        hiprune.sampling(stop=[1])


async def test_a_closed_client_says_so():
    client = hiprune.Client("127.0.0.1:1")
    with pytest.raises(errors.Unavailable):
        await client.ask("?")
    await client.close()
    with pytest.raises(errors.InvalidInput, match="is closed"):
        await client.ask("?")


async def test_the_longest_timeout_is_not_over_at_once():
    async with hiprune.Client("127.0.0.1:1", timeout_s=10**9) as client:
        with pytest.raises(errors.Unavailable):
            await client.ask("?")


def test_a_client_may_be_made_before_there_is_an_event_loop():
    client = hiprune.Client("127.0.0.1:1", pruner="127.0.0.1:1")

    async def use() -> None:
        async with client:
            for asked in (client.ask("?"), client.prune(b"x")):
                with pytest.raises(errors.Unavailable):
                    await asked

    asyncio.run(use())


async def test_a_path_is_no_image():
    async with hiprune.Client(pruner="127.0.0.1:1") as client:
        with pytest.raises(errors.InvalidInput, match="media: got str, expected the bytes"):
            await client.prune("picture.png")


async def test_a_service_that_is_not_there_is_unavailable_within_the_deadline():
    async with hiprune.Client("127.0.0.1:1", pruner="127.0.0.1:1", encoder="127.0.0.1:1") as client:
        for asked in (client.ask("?"), client.prune(b"x"), client.encode(b"x")):
            with pytest.raises((errors.Unavailable, errors.Expired)):
                async with asyncio.timeout(20):
                    await asked
