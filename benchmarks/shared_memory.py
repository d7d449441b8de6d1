"""Claim: a large answer of the encoder is sooner at the pruner through shared memory than inline.

    python -m benchmarks.shared_memory [--pairs 15] [--name shared_memory]

A child process serves the encoder's own servicer on a Unix socket, with views made beforehand in place of a
tower. This process asks for the same views inline and through a segment, in turn, until it holds numpy views
of all their rows and has a third of them in memory of its own. Beside it, in one process: what each copy on
either way costs, and one plain copy of the bytes, which no way can beat that has to copy them once.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import mmap
import operator
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
import torch

from benchmarks import plots, report
from hiprune import tensors
from hiprune.calls import MAX_MESSAGE_BYTES, connect
from hiprune.checkpoints import open_checkpoint
from hiprune.config import EMBEDDED_MODEL
from hiprune.shared_memory import Borrower, Lender
from hiprune.tensors import Memory
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2, tensor_pb2
from services.encoder.engine import Encoded
from services.encoder.families import EncodedView
from services.encoder.service import EncoderServicer
from services.encoder.settings import Settings

CLAIM: Final = "a large answer of the encoder is sooner at the pruner through shared memory than inline"
DIRECTORY: Final = "/dev/shm"
LAYERS: Final = (1, 2)
KEEP: Final = 1 / 3
ADDRESS_WAIT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Case:
    """An answer: V views of N tokens, D channels of 2 bytes. Qwen is Qwen2.5-VL-3B, by tokens."""

    name: str
    views: int
    tokens: int
    channels: int

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.views * self.tokens * self.channels * 2


CASES: Final = (
    Case("Qwen, 64", 1, 64, 2048),
    Case("Qwen, 144", 1, 144, 2048),
    Case("LLaVA-1.5", 1, 576, 1024),
    Case("Qwen, 600", 1, 600, 2048),
    Case("LLaVA-NeXT", 5, 576, 1024),
    Case("Qwen, 4k", 1, 4096, 2048),
    Case("Qwen, 16k", 1, 16_384, 2048),
)


# --- the server ------------------------------------------------------------------------------------------


class Ready:
    """In place of the engine: what a tower would return, made beforehand. The media's bytes name the case."""

    def __init__(self) -> None:
        self._encoded = {case.name.encode(): _encoded(case) for case in CASES}

    async def encode(self, media: media_pb2.Media, layers: Collection[int], **_: object) -> Encoded:
        """The views of a case."""
        return self._encoded[media.image]


def _encoded(case: Case) -> Encoded:
    draw = torch.Generator().manual_seed(0)
    views = [
        EncodedView(
            features=torch.randn(case.tokens, case.channels, generator=draw).half(),
            scores={layer: torch.rand(case.tokens, generator=draw) for layer in LAYERS},
            grid=(1, case.tokens),
        )
        for _ in range(case.views)
    ]
    return Encoded(views, encoder_service_pb2.MediaLayout())


async def serve(address: str) -> None:
    """Serves until the parent closes our standard input."""
    torch.set_num_threads(1)
    servicer = EncoderServicer(Settings.read([], {"HIPRUNE_ENCODER_SHARED_MEMORY_MIN_BYTES": "1"}))
    checkpoint = open_checkpoint(str(EMBEDDED_MODEL))
    engine: Any = Ready()
    servicer.equip(checkpoint, encoder_service_pb2.ModelFingerprint(vision_digest="x" * 64), engine)
    server = grpc.aio.server(options=[("grpc.max_send_message_length", MAX_MESSAGE_BYTES)])
    encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    await servicer.close()


# --- the client ------------------------------------------------------------------------------------------


class Hop:
    """One connection to the server, as the pruner has it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self._loop = loop
        self._borrower = Borrower(DIRECTORY)
        self._worker = ThreadPoolExecutor(1)

        async def dial() -> grpc.aio.Channel:
            channel = connect(address)
            await asyncio.wait_for(channel.channel_ready(), ADDRESS_WAIT_S)
            return channel

        self.channel = loop.run_until_complete(dial())
        self._stub = encoder_service_pb2_grpc.EncoderServiceStub(self.channel)
        response = loop.run_until_complete(self._answer(CASES[0], ""))
        self._borrower.learn(response.shared_memory_probe)
        if not self._borrower.token:
            raise SystemExit(f"no shared memory in {DIRECTORY}")

    async def _answer(self, case: Case, token: str) -> encoder_service_pb2.EncodeImageResponse:
        request = encoder_service_pb2.EncodeImageRequest(
            media=media_pb2.Media(image=case.name.encode()), layers=LAYERS, shared_memory_token=token
        )
        response: encoder_service_pb2.EncodeImageResponse = await self._stub.EncodeImage(request, timeout=60)
        return response

    async def _take(self, case: Case, *, shared: bool) -> list[npt.NDArray[np.uint8]]:
        """The kept rows of each view, (K, 2·D) bytes; taken on a thread, as in the pruner."""
        response = await self._answer(case, self._borrower.token if shared else "")
        return await self._loop.run_in_executor(self._worker, self._kept, case, response, shared)

    def _kept(
        self, case: Case, response: encoder_service_pb2.EncodeImageResponse, shared: bool
    ) -> list[npt.NDArray[np.uint8]]:
        memory = self._borrower.take(response)
        if (memory is not None) != shared:
            raise SystemExit(f"{case.name}: asked for {'a segment' if shared else 'bytes'} and got the other")
        return [rows_of(view.features, memory)[kept_of(case)] for view in response.views]

    def seconds(self, case: Case, *, shared: bool) -> float:
        """Time of one hop."""
        begun = time.perf_counter()
        self._loop.run_until_complete(self._take(case, shared=shared))
        return time.perf_counter() - begun

    def digest(self, case: Case, *, shared: bool) -> bytes:
        """Of the kept rows."""
        kept = self._loop.run_until_complete(self._take(case, shared=shared))
        return hashlib.sha256(b"".join(each.tobytes() for each in kept)).digest()

    def stall_seconds(self, case: Case, *, shared: bool) -> float:
        """The longest time in which this process's event loop did nothing else during one hop."""

        async def work() -> float:
            longest = 0.0
            task = asyncio.create_task(self._take(case, shared=shared))
            while not task.done():
                begun = time.perf_counter()
                await asyncio.sleep(0)
                longest = max(longest, time.perf_counter() - begun)
            await task
            return longest

        return self._loop.run_until_complete(work())


def rows_of(message: tensor_pb2.Tensor, memory: Memory | None) -> npt.NDArray[np.uint8]:
    """A view (N, 2·D) of a tensor's bytes where they lie; inline, protobuf makes one copy to give them."""
    count, channels = message.shape
    if memory is None:
        return np.frombuffer(message.data, np.uint8).reshape(count, channels * 2)
    data = memory.read(message.shared_memory, tensors.length_of(message), field="features")
    return np.frombuffer(data, np.uint8).reshape(count, channels * 2)


@cache
def kept_of(case: Case) -> npt.NDArray[np.int64]:
    """Which rows are kept: a third, anywhere, ascending."""
    order = np.random.default_rng(0).permutation(case.tokens)
    return np.sort(order[: round(case.tokens * KEEP)])


# --- each step by itself ---------------------------------------------------------------------------------


def steps_ms(case: Case, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each copy on either way, in this process."""
    (features, *_) = (
        view.features for view in _encoded(Case("", 1, case.views * case.tokens, case.channels)).views
    )
    source = tensors.elements(features)
    there = np.empty_like(source)
    there.fill(0)
    message = encoder_service_pb2.EncodeImageResponse()
    tensors.fill(message.views.add().features, features)
    wire = message.SerializeToString()
    kept = np.arange(0, len(features), 3)
    lender = Lender(DIRECTORY, max_bytes=2**40)
    lender.open()

    def write() -> None:
        loan = lender.lend(case.size)
        if loan is None:
            raise SystemExit(f"no shared memory in {DIRECTORY}")
        loan.write([(tensor_pb2.Tensor(), features)])
        lender.end(loan)

    def allocate() -> None:
        with tempfile.TemporaryFile(dir=DIRECTORY) as other:
            os.posix_fallocate(other.fileno(), 0, len(source))
            np.copyto(np.frombuffer(mmap.mmap(other.fileno(), len(source)), np.uint8), source)

    with tempfile.TemporaryFile(dir=DIRECTORY) as file:
        file.write(source.data)
        file.flush()

        def take() -> None:
            mapped = mmap.mmap(file.fileno(), len(source), mmap.MAP_SHARED, mmap.PROT_READ)
            np.frombuffer(mapped, np.uint8).reshape(len(features), -1)[kept]

        works: dict[str, Callable[[], object]] = {
            "memcpy": lambda: np.copyto(there, source),
            "memcpy to new memory": source.copy,
            "inline: fill the message": lambda: _filled(features),
            "inline: serialise": message.SerializeToString,
            "inline: parse": lambda: encoder_service_pb2.EncodeImageResponse.FromString(wire),
            "inline: read the field": lambda: message.views[0].features.data,
            "inline: take a third": lambda: source.reshape(len(features), -1)[kept],
            "segment: write and remove": write,
            "segment: allocate, write through a mapping, remove": allocate,
            "segment: map and take a third": take,
        }
        found = {
            name: report.spread([1000 * _seconds(work) for _ in range(count)]) for name, work in works.items()
        }
    asyncio.run(lender.close())
    return found


def _filled(features: torch.Tensor) -> encoder_service_pb2.EncodeImageResponse:
    response = encoder_service_pb2.EncodeImageResponse()
    tensors.fill(response.views.add().features, features)
    return response


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# --- all of it -------------------------------------------------------------------------------------------


def measure(count: int, warm_up: int) -> dict[str, Any]:
    """Each case both ways."""
    torch.set_num_threads(1)
    loop = asyncio.new_event_loop()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="hiprune-") as folder:
        address = f"unix:{folder}/encoder.sock"
        command = [sys.executable, "-m", "benchmarks.shared_memory", "--serve", address]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
            hop = Hop(loop, address)
            for case in CASES:
                if hop.digest(case, shared=False) != hop.digest(case, shared=True):
                    raise SystemExit(f"{case.name}: the two ways give other rows")
                results[case.name] = measure_case(hop, case, count, warm_up)
                print(f"{case.name}: measured", flush=True)
            loop.run_until_complete(hop.channel.close())
            server.communicate()
    loop.close()
    return results


def measure_case(hop: Hop, case: Case, count: int, warm_up: int) -> dict[str, Any]:
    """Both ways of one case, in turn, and its steps."""
    inline, shared = report.pairs(
        lambda: hop.seconds(case, shared=False),
        lambda: hop.seconds(case, shared=True),
        count=count,
        warm_up=warm_up,
    )
    stalls = report.pairs(
        lambda: hop.stall_seconds(case, shared=False),
        lambda: hop.stall_seconds(case, shared=True),
        count=max(3, count // 3),
        warm_up=1,
    )
    steps = steps_ms(case, max(3, count // 2))
    return {
        "bytes": case.size,
        "inline_ms": report.spread([1000 * value for value in inline]),
        "shared_ms": report.spread([1000 * value for value in shared]),
        "ratio": report.spread([a / b for a, b in zip(inline, shared, strict=True)]),
        "loop_stall_inline_ms": report.spread([1000 * value for value in stalls[0]]),
        "loop_stall_shared_ms": report.spread([1000 * value for value in stalls[1]]),
        "steps_ms": steps,
    }


def draw(results: dict[str, Any], name: str) -> None:
    """The plot."""
    megabytes = [found["bytes"] / 1e6 for found in results.values()]

    def line(*keys: str) -> list[tuple[float, float]]:
        values = [functools.reduce(operator.getitem, keys, found)["median"] for found in results.values()]
        return list(zip(megabytes, values, strict=True))

    hop = {
        "inline": line("inline_ms"),
        "segment": line("shared_ms"),
        "one copy": line("steps_ms", "memcpy to new memory"),
    }
    held = {"inline": line("loop_stall_inline_ms"), "segment": line("loop_stall_shared_ms")}
    common: Any = {"x": "answer, MB", "y": "ms", "log_x": True, "log_y": True, "ticks": [1, 3, 10, 30, 67]}
    panels = [
        plots.Panel(title="encoder to pruner, a third taken", lines=hop, **common),
        plots.Panel(title="the pruner's event loop is held", lines=held, **common),
    ]
    plots.plot(name, panels)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="shared_memory", help="name of the result file")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve))
        return
    results = measure(options.pairs, options.warm_up)
    report.table(
        "encoder → pruner, a third of the rows taken: median milliseconds",
        ("answer", "MB", "inline", "segment", "×", "memcpy", "loop, inline", "loop, segment"),
        [
            (
                name,
                found["bytes"] / 1e6,
                found["inline_ms"]["median"],
                found["shared_ms"]["median"],
                found["ratio"]["median"],
                found["steps_ms"]["memcpy to new memory"]["median"],
                found["loop_stall_inline_ms"]["median"],
                found["loop_stall_shared_ms"]["median"],
            )
            for name, found in results.items()
        ],
    )
    last = results[CASES[-1].name]
    report.table(
        f"{CASES[-1].name}, step by step",
        ("step", "ms"),
        [(name, found["median"]) for name, found in last["steps_ms"].items()],
    )
    draw(results, options.name)
    settings = {
        "pairs": options.pairs,
        "warm_up": options.warm_up,
        "kept": "a third of the rows",
        "directory": DIRECTORY,
        "socket": "unix",
        "torch_threads": 1,
    }
    print(report.write(options.name, CLAIM, settings, results))


if __name__ == "__main__":
    main()
