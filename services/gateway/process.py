"""The gateway as a process: listens, serves, drains, leaves.

uvicorn is the HTTP server; signals, the socket and certificates are ours. On SIGTERM the gateway says that it
is not ready, takes no new connection, lets running answers end within `drain_ms`, and leaves with code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvicorn

from hiprune import auth
from hiprune.config import ConfigError
from hiprune.telemetry import logs
from hiprune.telemetry.exporters import Exporters
from hiprune.trust import LOOK_EVERY_S, Certificates
from services.gateway.app import Gateway, make_app
from services.gateway.backend import Backend
from services.gateway.fetch import Fetcher
from services.gateway.pages import Playground
from services.gateway.settings import Settings

log = logging.getLogger("hiprune.gateway")

_KEEP_ALIVE_S: Final = 75
"""How long an idle connection is kept: longer than clients and the usual proxies keep theirs (60 s), so that
none sends a request on one that is just being closed."""
_BACKLOG: Final = 2048


def main() -> None:
    """Entry point of `python -m services.gateway`. A wrong setting is one line and exit code 2."""
    try:
        settings = Settings.read(sys.argv[1:], os.environ)
        logs.set_up(settings)
        exporters = Exporters.of(settings)
        try:
            asyncio.run(run(settings))
        finally:
            exporters.close()
    except ConfigError as error:
        print(f"hiprune {Settings.service}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


async def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises ConfigError."""
    certificates = Certificates(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
    backend = Backend(settings)
    fetcher = Fetcher(
        settings.hosts,
        allow_http=settings.image_http,
        max_bytes=settings.max_image_bytes,
        timeout_s=settings.image_timeout_ms / 1000,
    )
    gateway = Gateway(settings, backend, fetcher)
    playground = Playground(settings)
    gateway.intake.watch()
    context = _context(settings)
    config = uvicorn.Config(
        make_app(gateway, playground),
        loop="none",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_ms / 1000),
    )
    config.load()
    config.ssl = context
    for chatty in ("uvicorn", "httpcore2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    server = _Server(config)
    listening = bind(settings.listen)

    def leave() -> None:
        log.info("draining")
        gateway.intake.draining = True
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    renewing = asyncio.create_task(_renew(certificates, settings, context)) if certificates else None
    _say_who_may_call(settings)
    log.info("listening on %s, asking the llm at %s", settings.listen, settings.llm)
    try:
        await server.serve(sockets=[listening])
    finally:
        if renewing is not None:
            renewing.cancel()
        await fetcher.close()
        await backend.close()
        if auth.is_unix(settings.listen):
            with contextlib.suppress(OSError):
                os.unlink(settings.listen.removeprefix("unix:"))
        log.info("stopped")


class _Server(uvicorn.Server):
    """uvicorn's, whose signals are ours: its own would end the process by them, as if it had failed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def bind(listen: str) -> socket.socket:
    """The listening socket of an address. Raises ConfigError."""
    try:
        if auth.is_unix(listen):
            return _bind_file(listen.removeprefix("unix:"))
        host, _, port = listen.rpartition(":")
        family, *_, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # with the protocol's number: asyncio switches Nagle's algorithm off for sockets that say so, and with
        # it on a stream's second part waits 40 ms for the client's acknowledgement of the first
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"listen (--listen): got {listen!r}, which cannot be bound: {error.strerror or error}"
        ) from error
    return made


def _bind_file(path: str) -> socket.socket:
    """A Unix socket, in the place of one that nobody serves on. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if Path(path).is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError(errno.EADDRINUSE, "another process serves there")
    made.bind(path)
    made.listen(_BACKLOG)
    return made


def _context(settings: Settings) -> ssl.SSLContext | None:
    """How to speak TLS; None where there is no certificate. Its files have been checked."""
    if not settings.tls_cert or auth.is_unix(settings.listen):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _renew(certificates: Certificates, settings: Settings, context: ssl.SSLContext | None) -> None:
    """Gives handshakes the certificate that is in the files now."""
    seen = certificates.generation
    while context is not None:
        await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.to_thread(certificates.look)
        if certificates.generation != seen:
            seen = certificates.generation
            context.load_cert_chain(settings.tls_cert, settings.tls_key)


def _say_who_may_call(settings: Settings) -> None:
    """A line in the log, and a warning for what may surprise."""
    at = settings.listen
    if settings.allow_anonymous:
        log.warning("allow_anonymous: anybody who reaches %s may ask what the llm answers without a key", at)
    elif auth.is_private(at):
        log.info("everybody on this machine who reaches %s may ask whatever the llm lets them", at)
    else:
        log.info("on %s are served holders of a key that the llm knows", at)
        if not settings.tls_cert:
            log.warning(
                "keys come to %s in plain text, for everybody on the way to read: set tls_cert and tls_key, "
                "unless what is in front speaks TLS",
                at,
            )
    if auth.is_unix(at) and os.stat(at.removeprefix("unix:")).st_mode & stat.S_IWOTH:
        log.info("everybody on this machine may open %s", at)
