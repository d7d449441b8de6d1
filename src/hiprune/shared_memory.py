"""Memory beside an answer for its tensors to lie in: files in a directory that both sides have mounted.

A server lends a segment, a file that it names, for one call. The client removes the name as soon as it has
the file open, so that the segment lives exactly as long as somebody reads it; the server removes the names
of what nobody took. A client proves with a token, read from a file of the server's, that both mean the same
directory. Whatever goes wrong here is a reason to send bytes inline and never one to fail a call.

Knows files and places within them; knows no service, no socket and no event loop but for the last wait. The
client trusts the server's names no further than their pattern. Both run as the same user: a process of that
user could shorten a file while it is mapped, and one of another user can neither read nor plant one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hmac
import logging
import mmap
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from google.protobuf.message import Message

from hiprune import tensors
from hiprune.errors import InvalidInput
from hiprune.tensors import Memory
from hiprune.v1 import tensor_pb2

log = logging.getLogger("hiprune.shared_memory")

ALIGNMENT: Final = 64
"""Bytes to whose multiples tensors are aligned in a segment: a cache line, and any vector unit's width."""
REST_S: Final = 60.0
"""For how long a client asks for bytes inline after a segment that it could not use."""
PATIENCE_S: Final = 1.0
"""How long a leaving server waits for the last clients to take what it has lent."""

_SEGMENT: Final = re.compile(r"hiprune-[0-9a-f]{16}-[0-9a-f]{32}")
_PROBE: Final = re.compile(r"hiprune-[0-9a-f]{16}-probe")
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a planted pipe would block


class SegmentError(Exception):
    """A segment cannot be used. The caller asks for the bytes inline."""


# --- the server's side -------------------------------------------------------------------------------------


class Loan:
    """A segment for one answer. `write` once, on any thread; `end` at any time removes what nobody took."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self._path = path
        self._lock = threading.Lock()
        self._begun = self._ended = False

    @staticmethod
    def size_of(parts: Sequence[torch.Tensor]) -> int:
        """Bytes of the segment that holds these tensors."""
        size = 0
        for tensor in parts:
            size = _aligned(size) + tensor.nbytes
        return size

    def write(self, parts: Sequence[tuple[tensor_pb2.Tensor, torch.Tensor]]) -> None:
        """Writes the tensors and says in each one's message where. Raises OSError, as when memory is full.

        One copy, and without the interpreter's lock. Writing allocates as it goes, so that a full directory
        is an error here; through a mapping it would be the end of the process.
        """
        with self._lock:
            if self._ended:
                raise FileNotFoundError("the call is over")
            file = os.open(self._path, _CREATE, 0o600)
            self._begun = True
        try:
            end = 0
            for message, tensor in parts:
                offset = _aligned(end)
                end = _write(file, tensors.elements(tensor).data, offset)
                tensors.describe(message, tensor)
                message.shared_memory.segment = self._path.name
                message.shared_memory.offset = offset
        finally:
            os.close(file)

    @property
    def has_ended(self) -> bool:
        """Nobody will take it any more."""
        return self._ended

    def is_taken(self) -> bool:
        """The client has it, or it has ended."""
        return self._ended or (self._begun and not os.path.lexists(self._path))

    def end(self) -> None:
        """Removes the segment if nobody has taken it; one that is not there yet will not come to be."""
        with self._lock:
            self._ended = True
            _remove(self._path)


class Lender:
    """A server's segments: at most `max_bytes` that no client has taken yet.

    Off, lending nothing, where `directory` is empty or cannot be written to.
    """

    def __init__(self, directory: str, *, max_bytes: int) -> None:
        self.probe = ""
        self._directory = directory
        self._max_bytes = max_bytes
        self._server = secrets.token_hex(8)
        self._token = secrets.token_hex(16)
        self._lock_file: int | None = None
        self._loans: list[Loan] = []

    def open(self) -> None:
        """Removes what dead servers left, and puts the probe in place."""
        if not self._directory:
            return
        probe = Path(self._directory) / f"hiprune-{self._server}-probe"
        unseen = probe.with_suffix(".new")  # nobody looks at it before it is locked, and has its name
        try:
            _sweep(Path(self._directory))
            self._lock_file = os.open(unseen, _CREATE, 0o600)
            # held while this process lives, however it ends: who finds it free may clean up behind us
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(self._lock_file, memoryview(self._token.encode()), 0)
            unseen.rename(probe)
        except OSError as error:
            log.info("no shared memory in %s: %s", self._directory, error)
            self._let_go(unseen)
            return
        self.probe = probe.name

    def admits(self, token: str) -> bool:
        """Whether a client with this token sees the directory."""
        return hmac.compare_digest(token.encode(), self._token.encode())

    def lend(self, size: int) -> Loan | None:
        """A segment of `size` bytes, above 0, still to be written; None when too many wait to be taken."""
        self._loans = [loan for loan in self._loans if not loan.is_taken()]
        if not self.probe or self.waiting_bytes() + size > self._max_bytes:
            return None
        loan = Loan(Path(self._directory) / f"hiprune-{self._server}-{secrets.token_hex(16)}", size)
        self._loans.append(loan)
        return loan

    def end(self, loan: Loan) -> None:
        """The call is over: what has not been taken will not be."""
        loan.end()
        with contextlib.suppress(ValueError):
            self._loans.remove(loan)

    def waiting_bytes(self) -> int:
        """Bytes lent that no client has taken."""
        return sum(loan.size for loan in self._loans if not loan.is_taken())

    async def close(self) -> None:
        """Removes everything of this server's, once the last clients had a moment to take theirs."""
        patience = time.monotonic() + PATIENCE_S
        # a name that another process removes sets no event
        while self.waiting_bytes() and time.monotonic() < patience:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for loan in list(self._loans):
            self.end(loan)
        if self.probe:
            self._let_go(Path(self._directory) / self.probe)
        self.probe = ""

    def _let_go(self, probe: Path) -> None:
        if self._lock_file is not None:
            _remove(probe)
            os.close(self._lock_file)
            self._lock_file = None


def _write(file: int, data: memoryview, offset: int) -> int:
    """Writes all of it at an offset and returns where it ends. Raises OSError."""
    rest = data
    while len(rest):
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
    return offset


def _sweep(directory: Path) -> None:
    """Removes the files of servers whose lock nobody holds. Raises OSError for the directory itself."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.name.startswith("hiprune-")]
    ours = [name for name in names if _SEGMENT.fullmatch(name) or _PROBE.fullmatch(name)]
    for server in {name[: len("hiprune-") + 16] for name in ours}:
        with contextlib.suppress(OSError), _locked(directory / f"{server}-probe"):
            # the probe last: without it nobody could tell whose the others are
            for name in ours:
                if name.startswith(server) and _SEGMENT.fullmatch(name):
                    _remove(directory / name)
            _remove(directory / f"{server}-probe")


@contextlib.contextmanager
def _locked(probe: Path) -> Iterator[None]:
    """Holds the lock of a server that is gone. Raises OSError where it is not, or where that is not sure."""
    file = os.open(probe, _READ)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    """Removes a name. One that is gone, or that cannot be removed, is no trouble of the call."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s stays behind: %s", path.name, error)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


# --- the client's side -------------------------------------------------------------------------------------


class Segment:
    """One lent segment, taken: a `hiprune.tensors.Memory`. It is unmapped with the last view of it.

    Its name is gone once this returns. Raises SegmentError.
    """

    def __init__(self, directory: str, name: str) -> None:
        self._name = name
        if not _SEGMENT.fullmatch(name):
            raise SegmentError(f"{name[:80]!r} is no segment's name")
        path = Path(directory) / name
        try:
            file = os.open(path, _READ)
            try:
                size = _owned_size(file)
                path.unlink(missing_ok=True)
                self._bytes = memoryview(mmap.mmap(file, size, mmap.MAP_SHARED, mmap.PROT_READ))
            finally:
                os.close(file)
        except (OSError, ValueError) as error:  # ValueError: mmap's for a file that is empty
            raise SegmentError(str(error)) from error

    def read(self, place: tensor_pb2.SharedMemory, length: int, *, field: str) -> memoryview:
        """The `length` bytes at `place`, read-only. Raises InvalidInput for a place that is not in here."""
        if place.segment != self._name:
            raise InvalidInput(f"{place.segment[:80]!r} is not this answer's", field=f"{field}.segment")
        if place.offset % ALIGNMENT or not 0 <= place.offset <= len(self._bytes) - length:
            raise InvalidInput(
                f"{length} bytes at {place.offset}, expected a multiple of {ALIGNMENT} and no end beyond "
                f"{len(self._bytes)}",
                field=f"{field}.offset",
            )
        return self._bytes[place.offset : place.offset + length]


class Borrower:
    """A client's side of one server: what it must send to be lent segments, and how it takes them."""

    def __init__(self, directory: str) -> None:
        self.token = ""
        self._directory = directory
        self._tried = ""
        self._rests_until = 0.0

    def learn(self, probe: str) -> None:
        """Reads the token of a server that named its probe: another server's than before, or the first."""
        if not probe or not self._directory or time.monotonic() < self._rests_until:
            return
        if probe == self._tried and not self.token:
            return  # it could not be read, and nothing has changed since
        self._tried = probe
        try:
            self.token = _read_token(self._directory, probe)
            log.info("large answers may come through shared memory in %s", self._directory)
        except SegmentError as error:
            self.token = ""
            log.info("answers come inline, the server's memory is not in %s: %s", self._directory, error)

    def rest(self) -> None:
        """Asks for no segment for a while: the last one could not be used."""
        self.token = self._tried = ""
        self._rests_until = time.monotonic() + REST_S

    def take(self, message: Message) -> Memory | None:
        """The segment that an answer's tensors lie in, or None where they all hold their bytes.

        Raises SegmentError.
        """
        names = {
            each.shared_memory.segment
            for each in tensors.tensors_in(message)
            if each.WhichOneof("payload") == "shared_memory"
        }
        if len(names) > 1:
            raise SegmentError(f"{len(names)} segments, expected one an answer")
        if not names:
            return None
        segment = Segment(self._directory, names.pop())
        log.debug("an answer's rows came through shared memory")
        return segment


def _read_token(directory: str, probe: str) -> str:
    """What a probe holds. Raises SegmentError."""
    if not _PROBE.fullmatch(probe):
        raise SegmentError(f"{probe[:80]!r} is no probe's name")
    try:
        file = os.open(Path(directory) / probe, _READ)
        try:
            _owned_size(file)
            token = os.read(file, 64).decode("ascii", "replace")
        finally:
            os.close(file)
    except OSError as error:
        raise SegmentError(str(error)) from error
    if not _TOKEN.fullmatch(token):
        raise SegmentError("the probe holds no token")
    return token


def _owned_size(file: int) -> int:
    """Size in bytes of an open file, once it is a regular one of our own user's. Raises SegmentError."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise SegmentError("not a regular file")
    if status.st_uid != os.geteuid():
        raise SegmentError(f"owned by user {status.st_uid}, and this process runs as {os.geteuid()}")
    return status.st_size
