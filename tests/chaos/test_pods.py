"""Claims about a pod of encoder and pruner, told to stop under load: with processes, in the kubelet's order.

The commands are those of the manifests, with this machine's paths for the pod's. The kubelet runs the hooks
of all containers at once; a container gets its SIGTERM when its hook has ended, and a sidecar not before all
others are gone (Kubernetes' `killContainer` and `terminationOrdering`). Callers find a pod that is ready.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hiprune.client import Client
from hiprune.stack import free_port
from tests.chaos.load import DEADLINE_S, Tally, judged, until
from tests.chaos.proxy import SlowProxy
from tests.deploy import manifests

pytestmark = pytest.mark.extra


def status(address: str, name: str = "") -> str:
    """What health says about a name at an address; empty where nobody answers."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=name), timeout=2
            )
        except grpc.RpcError:
            return ""
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


class Endpoint(SlowProxy):
    """The way to a pod, as a service of Kubernetes' has it: new connections while it is ready."""

    ready = False

    @property
    def is_used(self) -> bool:
        """Whether somebody is connected."""
        return bool(self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.ready:
            await super()._accept(reader, writer)
        else:
            writer.close()


class Pod:
    """The containers of the vision pod as processes, with the folder that stands for their common volume."""

    def __init__(self, folder: Path, port: int, environ: dict[str, str]) -> None:
        found = manifests.services("single-gpu")
        self._containers = {name: found[name] for name in ("pruner", "encoder")}
        self._folder = folder
        self.environ = environ
        self.address = f"127.0.0.1:{port}"
        self.endpoint = Endpoint(self.address)
        self.encoder_address = f"unix:{folder}/encoder.sock"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self) -> None:
        """The sidecar; when it is alive, the encoder; returns when both are ready."""
        self._start("pruner")
        await self._serves("pruner", self.address, "liveness")
        assert "encoder" not in self.processes or self.processes["encoder"].poll() is not None
        self._start("encoder")
        await self._serves("encoder", self.encoder_address)
        await self._serves("pruner", self.address)
        self.endpoint.ready = True

    async def _serves(self, name: str, address: str, about: str = "") -> None:
        """Returns when a container's health says so. Asked on a thread: requests go on meanwhile."""
        end_s = time.monotonic() + 60
        while await asyncio.to_thread(status, address, about) != "SERVING":
            assert time.monotonic() < end_s, self.log(name)
            await asyncio.sleep(0.05)

    def _start(self, name: str) -> None:
        command = self._containers[name].spec.get("command") or ["python", "-m", f"services.{name}"]
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._here(command, name),
                env=self._variables(name),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def _here(self, command: list[str], name: str) -> list[str]:
        """A container's command as it is on this machine."""
        own = self.processes.get(name)
        words = [word.replace("/run/hiprune", str(self._folder)) for word in command]
        if own is not None:
            words = [word.replace("os.kill(1,", f"os.kill({own.pid},") for word in words]
        return [sys.executable if word == "python" else word for word in words]

    def _variables(self, name: str) -> dict[str, str]:
        """A container's variables, but for the model, the device and the addresses of this machine's."""
        prefix, place = f"HIPRUNE_{name.upper()}_", self.address if name == "pruner" else self.encoder_address
        pods = {
            key: value.replace("/run/hiprune", str(self._folder))
            for key, value in self._containers[name].values.items()
            if key.removeprefix(prefix) not in {"MODEL", "DEVICE", "GPU_MEMORY_FRACTION", "METRICS_LISTEN"}
        }
        return {**os.environ, **pods, **self.environ, f"{prefix}LISTEN": place}

    async def begin_to_stop(self) -> subprocess.Popen[bytes]:
        """Runs both hooks at once, and returns the encoder's, which may go on."""
        self.endpoint.ready = False
        hooks = {name: self._hook(name) for name in self._containers}
        assert await asyncio.to_thread(hooks["pruner"].wait, 10) == 0
        return hooks["encoder"]

    def _hook(self, name: str) -> subprocess.Popen[bytes]:
        command = self._containers[name].spec["lifecycle"]["preStop"]["exec"]["command"]
        return subprocess.Popen(self._here(command, name), stdin=subprocess.DEVNULL)

    async def stop(self, hook: subprocess.Popen[bytes] | None = None) -> None:
        """Ends the pod in order, and holds each step against what the order promises."""
        hook = hook or await self.begin_to_stop()
        await until(lambda: hook.poll() is not None, 60, lambda: self.log("pruner"))
        assert hook.returncode == 0, "the encoder's hook gave up"
        pruner, encoder = self.processes["pruner"], self.processes["encoder"]
        await until(lambda: pruner.poll() is not None, 5)
        assert pruner.returncode == 0, self.log("pruner")
        assert encoder.poll() is None, "the encoder went first"
        encoder.send_signal(signal.SIGTERM)
        await until(lambda: encoder.poll() is not None, 30, lambda: self.log("encoder"))
        assert encoder.returncode == 0, self.log("encoder")

    def kill(self) -> None:
        """Ends what is left."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        """What a container has said."""
        return (self._folder / f"{name}.log").read_text("utf-8", "replace")


@pytest.fixture(scope="module")
async def pods(house, tmp_path_factory) -> AsyncIterator[tuple[Pod, Pod]]:
    """Two pods of the manifests, with the house's Redis, on short paths, as Unix sockets want them."""
    token, secret = secrets.token_hex(16), secrets.token_hex(16)
    environ = {
        "HIPRUNE_PRUNER_PEER_TOKEN": token,
        "HIPRUNE_PRUNER_CACHE_SECRET": secret,
        "HIPRUNE_PRUNER_REDIS_URL": house.stack.redis_url,
    }
    made = tuple(Pod(tmp_path_factory.mktemp("pod"), free_port(), environ) for _ in range(2))
    async with made[0].endpoint, made[1].endpoint:
        try:
            await asyncio.gather(*(pod.start() for pod in made))
            yield made
        finally:
            for pod in made:
                pod.kill()


@pytest.fixture(scope="module")
async def front(house, pods) -> AsyncIterator[str]:
    """The address of an llm that knows both pods."""
    stack, address = house.stack, f"127.0.0.1:{free_port()}"
    token = pods[0].environ["HIPRUNE_PRUNER_PEER_TOKEN"]
    places = ",".join(pod.endpoint.address for pod in pods)
    stack.set_environ(HIPRUNE_LLM_PRUNER=f"ipv4:{places}", HIPRUNE_LLM_PEER_TOKEN=token)
    try:
        name = stack.start_replica("llm", address)
    finally:
        stack.set_environ(HIPRUNE_LLM_PRUNER=stack.pruner_address, HIPRUNE_LLM_PEER_TOKEN="")
    try:
        await asyncio.to_thread(stack.wait_ready, name)
        yield address
    finally:
        await asyncio.to_thread(stack.end, name)


async def test_pods_replaced_one_after_the_other_lose_no_request(
    pods: tuple[Pod, Pod], front: str, make_load: Callable[..., object]
) -> None:
    async with make_load(front) as load:
        await until(lambda: all(pod.endpoint.is_used for pod in pods))
        await load.right(30)
        for pod in pods:
            await pod.stop()
            await load.right(30)
            await pod.start()
            # what `minReadySeconds` is for
            await until(lambda p=pod: p.endpoint.is_used)
            await load.right(30)
    assert load.tally.refused == 0, load.tally.retryable


async def test_the_last_calls_of_a_pruner_find_its_encoder(house, pods: tuple[Pod, Pod], front: str) -> None:
    """The encoder stands still, so that calls are under way when the pod is told to stop."""
    leaving, other = pods
    await other.stop()
    tally, count = Tally(), 4
    encoder = leaving.processes["encoder"]
    async with Client(front, key=house.keys["crowd"], timeout_s=DEADLINE_S) as client:
        encoder.send_signal(signal.SIGSTOP)
        held = [
            asyncio.create_task(judged(house.judge, client, ask, tally, deadline_s=DEADLINE_S, fresh=True))
            for ask in house.judge.asks[:count]
        ]
        await until(lambda: house.encoding() >= count)
        drained = leaving.log("pruner").count("draining")
        hook = await leaving.begin_to_stop()
        await until(lambda: leaving.log("pruner").count("draining") > drained)
        await until(lambda: status(leaving.address) != "SERVING")
        assert hook.poll() is None, "the encoder's hook did not wait"
        encoder.send_signal(signal.SIGCONT)
        await asyncio.gather(*held)
        await leaving.stop(hook)
    assert (tally.right, tally.ended) == (count, count), str(tally)
