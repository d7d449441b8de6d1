"""The service on vLLM as a process: when vLLM ends, requests end, health says so, a restart serves again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from hiprune.client import Client, question_message
from hiprune.errors import Unavailable
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2
from tests.stacks import picture
from tests.tiny import make_llava
from tests.vllm.test_families import ENGINE

pytestmark = [pytest.mark.extra, pytest.mark.vllm]


def below(pid: int) -> dict[int, str]:
    """Processes below one, by number, with their names."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text("utf-8").partition(" (")[2].rpartition(") ")
            parents[int(stat.parent.name)], names[int(stat.parent.name)] = int(rest.split()[1]), name
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: names[child] for child in found - {pid}}


async def test_when_vllm_ends_the_service_says_so_leaves_and_serves_again_once_restarted(tmp_path):
    model = make_llava(tmp_path, context=4096)
    sampling = llm_service_pb2.Sampling(max_tokens=1000)
    request = llm_service_pb2.AskImageRequest(
        messages=[question_message("which colour ?", [picture("scene00.png")])], sampling=sampling
    )
    with Stack(model=str(model), redis=False, environ=ENGINE) as stack:
        service = stack.processes["llm"]
        async with Client(stack.address) as client:
            events = client.ask_stream(request)
            while (await anext(events)).WhichOneof("event") != "delta":
                pass
            started = below(service.pid)
            (core,) = (pid for pid, name in started.items() if name.startswith("VLLM::Engine"))
            os.kill(core, signal.SIGKILL)
            with pytest.raises(Unavailable):
                async for _ in events:
                    pass
            assert await asyncio.to_thread(service.wait, 60) == 1
            assert "can serve no more" in stack.log_of("llm")
            async with asyncio.timeout(30):  # vLLM's worker notices by itself
                while any(os.path.exists(f"/proc/{pid}") for pid in started):  # noqa: ASYNC110, ASYNC240
                    await asyncio.sleep(0.1)
            stack.processes.pop("llm")
            stack.start_service("llm")
            await asyncio.to_thread(stack.wait_ready, "llm")
            assert (await client.ask("which colour ?", picture("scene00.png"))).completion.token_ids
