"""Real Redis servers in the arrangements that a URL can name: TLS, Sentinels, a cluster. Loaded by tests."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hiprune.stack import find_redis

SLOTS = 16_384
_BUS = 10_000
"""A cluster's nodes talk on the port of clients plus this."""


def free_port(also: int = 0) -> int:
    """A TCP port on loopback that is free, and the one `also` above it too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                if also:
                    other.bind(("127.0.0.1", port + also))
                return port


@contextmanager
def servers(folder: Path, *commands: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs redis-server once with each list of arguments, in a folder of its own each."""
    program = str(find_redis())
    running = []
    try:
        for number, arguments in enumerate(commands):
            place = folder / f"server-{number}"
            place.mkdir()
            running.append(
                subprocess.Popen(
                    [program, *arguments],
                    cwd=place,
                    stdout=subprocess.DEVNULL,
                    stdin=subprocess.DEVNULL,
                )
            )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def until(ready: Callable[[], object], timeout_s: float = 20) -> None:
    """Returns when `ready` says so."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError, OSError):
            if ready():
                return
        assert time.monotonic() < deadline, "a Redis is not ready in time"
        time.sleep(0.02)


def plain(port: int, *options: str) -> list[str]:
    """Arguments of a server on a TCP port that keeps nothing on disk."""
    return ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *options]


@contextmanager
def cluster(folder: Path, nodes: int = 3) -> Iterator[list[int]]:
    """A cluster of masters that share out all slots: their ports."""
    ports = [free_port(_BUS) for _ in range(nodes)]
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "5000"]
    with servers(folder, *(plain(port, *options) for port in ports)):
        clients = [redis.Redis(port=port) for port in ports]
        for number, client in enumerate(clients):
            until(client.ping)
            slots = range(SLOTS * number // nodes, SLOTS * (number + 1) // nodes)
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for port in ports[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)
        for client in clients:
            until(lambda client=client: b"cluster_state:ok" in _info(client) and _known(client) == nodes)
            client.close()
        yield ports


def _info(client: redis.Redis) -> bytes:
    answer = client.execute_command("CLUSTER INFO")
    return b"\n".join(b"%b:%b" % (str(k).encode(), str(v).encode()) for k, v in answer.items())


def _known(client: redis.Redis) -> int:
    return int(client.execute_command("CLUSTER INFO")["cluster_known_nodes"])


@contextmanager
def watched(
    folder: Path, service: str, *, replicas: int
) -> Iterator[tuple[int, list[subprocess.Popen[bytes]]]]:
    """A master, replicas and a Sentinel: the Sentinel's port, and the processes in this order."""
    master, sentinel = free_port(), free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {sentinel}\nbind 127.0.0.1\n"
        f"sentinel monitor {service} 127.0.0.1 {master} 1\n"
        f"sentinel down-after-milliseconds {service} 300\n"
        f"sentinel failover-timeout {service} 1000\n",
        "utf-8",
    )
    fast = ["--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"]
    seconds = [plain(free_port(), *fast, "--replicaof", "127.0.0.1", str(master)) for _ in range(replicas)]
    with servers(folder, plain(master, *fast), *seconds, [str(config), "--sentinel"]) as running:
        with redis.Redis(port=sentinel) as guard:
            until(lambda: guard.sentinel_masters()[service]["num-slaves"] == replicas)
        yield sentinel, running


def certificate(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A fresh certificate for 127.0.0.1 that is its own authority, and its key: two PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


@asynccontextmanager
async def behind_tls(unix_socket: str, pem: Path, key: Path) -> AsyncIterator[int]:
    """Ends TLS in front of a Redis whose build knows none, as a proxy does: the port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem, key)
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(unix_socket)
        tasks.update(
            (
                asyncio.create_task(carry(reader, inner_writer)),
                asyncio.create_task(carry(inner_reader, writer)),
            )
        )

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
