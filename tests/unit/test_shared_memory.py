"""Segments: what is written is read back as it was, nothing stays behind, and no name or place is trusted."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hiprune import shared_memory, tensors
from hiprune.errors import InvalidInput
from hiprune.shared_memory import ALIGNMENT, Borrower, Lender, Loan, Segment, SegmentError
from hiprune.v1 import encoder_service_pb2, tensor_pb2

NAME = f"hiprune-{'0' * 16}-{'a' * 32}"
ROWS = torch.arange(7 * 3, dtype=torch.float32).reshape(7, 3)
HALF = torch.arange(5, dtype=torch.float16).reshape(5, 1)


@pytest.fixture
def lender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lender]:
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.0)
    made = Lender(str(tmp_path), max_bytes=10_000)
    made.open()
    yield made
    asyncio.run(made.close())


def written(lender: Lender, *parts: torch.Tensor) -> tuple[Loan, list[tensor_pb2.Tensor]]:
    """A segment with these tensors, and what the answer says of them."""
    loan = lender.lend(Loan.size_of(parts))
    assert loan is not None
    messages = [tensor_pb2.Tensor() for _ in parts]
    loan.write(list(zip(messages, parts, strict=True)))
    return loan, messages


def answer(*messages: tensor_pb2.Tensor) -> encoder_service_pb2.EncodeImageResponse:
    return encoder_service_pb2.EncodeImageResponse(
        views=[encoder_service_pb2.View(features=message) for message in messages]
    )


def names(directory: Path) -> set[str]:
    """What lies in the directory besides probes."""
    return {path.name for path in directory.iterdir() if not path.name.endswith("-probe")}


def place(offset: int = 0, segment: str = NAME) -> tensor_pb2.SharedMemory:
    return tensor_pb2.SharedMemory(segment=segment, offset=offset)


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes: the kernel writes a part and then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- there and back --------------------------------------------------------------------------------------


def test_what_was_lent_is_read_back_bit_for_bit_without_a_copy(lender, tmp_path):
    _, (rows, none, half) = written(lender, ROWS, torch.empty(0, 4), HALF)
    memory = Borrower(str(tmp_path)).take(answer(rows, none, half))
    for message, tensor in ((rows, ROWS), (none, torch.empty(0, 4)), (half, HALF)):
        assert message.shared_memory.offset % ALIGNMENT == 0
        back = tensors.from_proto(message, field="x", shape=(None, None), memory=memory)
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
    view = memory.read(half.shared_memory, HALF.nbytes, field="x")
    assert view.readonly
    assert isinstance(view.obj, mmap.mmap)
    taken = tensors.take_rows(rows, np.array([1, 5]), memory)
    assert torch.equal(tensors.from_proto(taken, field="x", shape=(2, 3)), ROWS[[1, 5]])


def test_numbers_in_shared_memory_are_checked_like_any_others(lender, tmp_path):
    _, (bad,) = written(lender, torch.tensor([[0.0, torch.nan]]))
    memory = Borrower(str(tmp_path)).take(answer(bad))
    with pytest.raises(InvalidInput, match="element 1"):
        tensors.from_proto(bad, field="x", shape=(1, 2), memory=memory, finite=True)


def test_a_segment_takes_what_its_size_says_and_each_tensor_lies_where_it_is_said(lender, tmp_path):
    loan, (rows, half) = written(lender, ROWS, HALF)
    (path,) = (tmp_path / name for name in names(tmp_path))
    content = path.read_bytes()
    assert len(content) == loan.size
    for message, tensor in ((rows, ROWS), (half, HALF)):
        start = message.shared_memory.offset
        assert content[start : start + tensor.nbytes] == tensors.elements(tensor).tobytes()


def test_a_message_is_made_whole_and_then_names_no_segment(lender, tmp_path):
    _, (rows,) = written(lender, ROWS)
    message = answer(rows, tensors.to_proto(HALF))
    memory = Borrower(str(tmp_path)).take(message)
    whole = tensors.inlined(message, memory)
    assert whole == answer(tensors.to_proto(ROWS), tensors.to_proto(HALF))
    assert b"hiprune-" not in whole.SerializeToString()
    assert tensors.inlined(whole, None) is whole
    assert message.views[0].features.HasField("shared_memory")


def test_views_outlive_the_segment_and_the_last_one_frees_it(lender, tmp_path):
    _, (rows,) = written(lender, ROWS)
    segment = Borrower(str(tmp_path)).take(answer(rows))
    table = np.frombuffer(segment.read(rows.shared_memory, ROWS.nbytes, field="x"), np.float32)

    def maps() -> int:
        return Path("/proc/self/maps").read_text("utf-8").count(rows.shared_memory.segment)

    del segment
    gc.collect()
    assert table.tolist() == ROWS.flatten().tolist()
    assert maps() == 1
    del table
    gc.collect()
    assert maps() == 0


# --- who removes what ------------------------------------------------------------------------------------


def test_taking_a_segment_removes_its_name_at_once(lender, tmp_path):
    loan, (rows,) = written(lender, ROWS)
    assert names(tmp_path) == {rows.shared_memory.segment}
    assert not loan.is_taken()
    memory = Borrower(str(tmp_path)).take(answer(rows))
    assert names(tmp_path) == set()
    assert loan.is_taken()
    lender.end(loan)
    assert bytes(memory.read(rows.shared_memory, ROWS.nbytes, field="x")) == ROWS.numpy().tobytes()
    with pytest.raises(SegmentError):
        Borrower(str(tmp_path)).take(answer(rows))


def test_what_nobody_took_goes_with_the_call(lender, tmp_path):
    loan, _ = written(lender, ROWS)
    lender.end(loan)
    lender.end(loan)
    assert names(tmp_path) == set()


def test_a_call_that_ends_before_its_segment_is_written_leaves_none(lender, tmp_path):
    loan = lender.lend(ROWS.nbytes)
    lender.end(loan)
    with pytest.raises(OSError, match="over"):
        loan.write([(tensor_pb2.Tensor(), ROWS)])
    assert names(tmp_path) == set()


def test_a_call_that_ends_while_its_segment_is_being_written_leaves_none(lender, tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(*arguments):
        begun.set()
        assert go_on.wait(10)
        return pwrite(*arguments)

    loan = lender.lend(ROWS.nbytes)
    monkeypatch.setattr(os, "pwrite", slow)
    writer = threading.Thread(target=loan.write, args=([(tensor_pb2.Tensor(), ROWS)],))
    writer.start()
    assert begun.wait(10)
    lender.end(loan)
    go_on.set()
    writer.join()
    assert names(tmp_path) == set()


async def test_a_server_that_leaves_waits_a_moment_and_then_removes_all_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.3)
    lender = Lender(str(tmp_path), max_bytes=10_000)
    lender.open()
    stranger = tmp_path / "hiprune-stranger"
    stranger.touch()
    _, (taken,) = written(lender, ROWS)
    written(lender, HALF)
    closing = asyncio.create_task(lender.close())
    await asyncio.sleep(0.05)
    memory = Borrower(str(tmp_path)).take(answer(taken))  # in time
    await closing
    assert memory is not None
    assert list(tmp_path.iterdir()) == [stranger]
    assert not lender.admits("")
    assert lender.lend(1) is None


def test_a_server_removes_what_a_dead_one_left_and_nothing_of_a_living_one(tmp_path, lender):
    program = (
        "import os, sys, torch\n"
        "from hiprune.shared_memory import Lender\n"
        "from hiprune.v1 import tensor_pb2\n"
        "lender = Lender(sys.argv[1], max_bytes=1000)\n"
        "lender.open()\n"
        "lender.lend(4).write([(tensor_pb2.Tensor(), torch.zeros(1))])\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    _, (living,) = written(lender, ROWS)
    kept = {lender.probe, living.shared_memory.segment}
    dead = {path.name for path in tmp_path.iterdir()} - kept
    assert len(dead) == 2
    for name in ("hiprune-notes", "hiprune-0-probe", "other"):
        (tmp_path / name).touch()
        kept.add(name)

    def start() -> set[str]:
        other = Lender(str(tmp_path), max_bytes=0)
        other.open()
        found = {path.name for path in tmp_path.iterdir()} - {other.probe}
        asyncio.run(other.close())
        return found

    assert start() == kept


# --- what is not lent ------------------------------------------------------------------------------------


def test_no_more_is_lent_than_may_wait(lender, tmp_path):
    first, (rows,) = written(lender, torch.zeros(6000, dtype=torch.int32)[:1500])
    unwritten = lender.lend(4000)
    assert lender.waiting_bytes() == 10_000
    assert lender.lend(1) is None
    memory = Borrower(str(tmp_path)).take(answer(rows))
    assert lender.waiting_bytes() == 4000
    assert lender.lend(6001) is None
    second = lender.lend(6000)
    lender.end(unwritten)
    lender.end(second)
    lender.end(first)
    assert lender.waiting_bytes() == 0
    assert memory is not None


def test_a_full_directory_is_an_error_of_the_write_and_leaves_nothing(lender, tmp_path):
    loan = lender.lend(8000)
    with full_after(4096), pytest.raises(OSError, match="too large") as caught:
        loan.write([(tensor_pb2.Tensor(), torch.zeros(2000))])
    assert caught.value.errno == errno.EFBIG
    loan.end()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("where", ["", "missing", "file"])
def test_without_a_directory_to_write_to_nothing_is_lent_and_nothing_fails(where, tmp_path):
    (tmp_path / "file").touch()
    lender = Lender(str(tmp_path / where) if where else "", max_bytes=100)
    lender.open()
    assert lender.probe == ""
    assert lender.lend(1) is None
    assert not lender.admits("")
    asyncio.run(lender.close())


def test_a_probe_that_cannot_be_written_is_removed(tmp_path):
    lender = Lender(str(tmp_path), max_bytes=100)
    with full_after(8):
        lender.open()
    assert lender.probe == ""
    assert list(tmp_path.iterdir()) == []


def test_files_are_for_one_user_alone(lender, tmp_path):
    written(lender, ROWS)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


# --- whom to lend to -------------------------------------------------------------------------------------


def test_who_reads_the_probe_is_admitted_and_nobody_else(lender, tmp_path):
    borrower = Borrower(str(tmp_path))
    assert not lender.admits(borrower.token)
    borrower.learn(lender.probe)
    assert lender.admits(borrower.token)
    for token in ("", "0" * 32, borrower.token[:-1], borrower.token.upper() + "x", "é" * 32):
        assert not lender.admits(token)
    assert (tmp_path / lender.probe).exists()


def test_a_client_follows_its_server_to_another_probe(lender, tmp_path):
    borrower = Borrower(str(tmp_path))
    borrower.learn(lender.probe)
    other = Lender(str(tmp_path), max_bytes=1)
    other.open()
    assert not other.admits(borrower.token)
    borrower.learn("")  # an answer through shared memory names none
    assert lender.admits(borrower.token)
    borrower.learn(other.probe)
    assert other.admits(borrower.token)
    asyncio.run(other.close())
    borrower.learn(f"hiprune-{'1' * 16}-probe")
    assert borrower.token == ""


def test_a_client_without_the_directory_asks_for_none(lender, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for directory in ("", str(elsewhere), str(tmp_path / "missing")):
        borrower = Borrower(directory)
        borrower.learn(lender.probe)
        assert borrower.token == ""


def test_a_client_rests_after_a_segment_that_it_could_not_use_and_then_tries_again(
    lender, tmp_path, monkeypatch
):
    borrower = Borrower(str(tmp_path))
    borrower.learn(lender.probe)
    borrower.rest()
    borrower.learn(lender.probe)
    assert borrower.token == ""
    monkeypatch.setattr(shared_memory, "REST_S", 0.0)
    borrower.rest()
    borrower.learn(lender.probe)
    assert lender.admits(borrower.token)


@pytest.mark.parametrize("content", [b"", b"x" * 32, b"a" * 31, b"a" * 33, b"A" * 32, bytes(32)], ids=repr)
def test_a_probe_that_holds_no_token_gives_none(content, tmp_path):
    probe = f"hiprune-{'1' * 16}-probe"
    (tmp_path / probe).write_bytes(content)
    borrower = Borrower(str(tmp_path))
    borrower.learn(probe)
    assert borrower.token == ""


# --- names and places that are not trusted ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "victim",
        "../victim",
        "/etc/hostname",
        f"../{NAME}",
        f"{NAME}/..",
        f"{NAME}\n",
        NAME + "a",
    ],
    ids=repr,
)
def test_a_name_that_is_no_segments_is_refused_and_touches_nothing(name, tmp_path):
    folder = tmp_path / "memory"
    folder.mkdir()
    for victim in (tmp_path / "victim", folder / "victim", tmp_path / NAME):
        victim.write_bytes(bytes(64))
    with pytest.raises(SegmentError, match="no segment's name"):
        Segment(str(folder), name)
    assert (tmp_path / "victim").exists()
    assert (folder / "victim").exists()
    assert (tmp_path / NAME).exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "link", "pipe", "folder", "a stranger's"])
def test_what_is_no_plain_file_of_ones_own_is_refused(kind, tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / NAME
    victim.write_bytes(bytes(64))
    match kind:
        case "empty":
            path.touch()
        case "link":
            path.symlink_to(victim)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "a stranger's":
            path.write_bytes(bytes(64))
            monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(SegmentError):
        Segment(str(tmp_path), NAME)
    assert victim.exists()
    assert path.exists() == (kind in ("link", "pipe", "folder", "a stranger's"))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "a stranger's"])
def test_a_probe_that_is_no_plain_file_of_ones_own_gives_no_token(kind, tmp_path, monkeypatch):
    probe = tmp_path / f"hiprune-{'1' * 16}-probe"
    (tmp_path / "token").write_bytes(b"a" * 32)
    match kind:
        case "link":
            probe.symlink_to(tmp_path / "token")
        case "pipe":
            os.mkfifo(probe)
        case "folder":
            probe.mkdir()
        case "a stranger's":
            probe.write_bytes(b"a" * 32)
            monkeypatch.setattr(os, "geteuid", lambda: probe.stat().st_uid + 1)
    borrower = Borrower(str(tmp_path))
    borrower.learn(probe.name)
    borrower.learn("../token")
    assert borrower.token == ""


@pytest.mark.parametrize("offset", [-64, -1, 1, 32, 64, 128, 2**62, -(2**63)])
def test_a_place_that_is_not_in_the_segment_is_refused_by_its_field(offset, tmp_path):
    (tmp_path / NAME).write_bytes(bytes(100))
    segment = Segment(str(tmp_path), NAME)
    message = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[10], shared_memory=place(offset))
    for use in (tensors.check, tensors.from_proto):
        with pytest.raises(InvalidInput, match=f"40 bytes at {offset}") as caught:
            use(message, field="x", shape=(None,), memory=segment)
        assert caught.value.field == "x.shared_memory.offset"


@pytest.mark.parametrize("shape", [(26,), (2**62,), (2**40, 2**40)], ids=str)
def test_a_claim_beyond_the_segment_is_refused(shape, tmp_path):
    (tmp_path / NAME).write_bytes(bytes(100))
    segment = Segment(str(tmp_path), NAME)
    message = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=shape, shared_memory=place())
    with pytest.raises(InvalidInput, match="no end beyond 100"):
        tensors.check(message, field="x", shape=(None,) * len(shape), memory=segment)


def test_a_place_in_another_segment_and_an_answer_in_two_are_refused(tmp_path):
    other = NAME[:-1] + "b"
    for name in (NAME, other):
        (tmp_path / name).write_bytes(bytes(100))
    messages = [
        tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[1, 1], shared_memory=place(segment=name))
        for name in (NAME, other)
    ]
    with pytest.raises(SegmentError, match="2 segments"):
        Borrower(str(tmp_path)).take(answer(*messages))
    memory = Borrower(str(tmp_path)).take(answer(messages[0]))
    with pytest.raises(InvalidInput, match="is not this answer's") as caught:
        tensors.check(messages[1], field="x", shape=(1, 1), memory=memory)
    assert caught.value.field == "x.shared_memory.segment"


def test_shared_memory_is_refused_where_nobody_asked_for_it():
    message = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[1, 1], shared_memory=place())
    uses = (
        lambda: tensors.check(message, field="x", shape=(1, 1)),
        lambda: tensors.from_proto(message, field="x", shape=(1, 1)),
        lambda: tensors.take_rows(message, np.array([0])),
        lambda: tensors.inlined(answer(message), None),
    )
    for use in uses:
        with pytest.raises(InvalidInput, match="lies in shared memory, expected data"):
            use()
