"""TLS by files: a service's certificate, and whose certificates it takes. Read again when they change.

A server looks at its files before every handshake, a client now and then; connections that are up stay up,
until their age ends them. Files that do not fit each other, as in the middle of a renewal, change nothing.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, cast

import grpc

from hiprune.config import ConfigError, ProcessSettings

log = logging.getLogger("hiprune.trust")

LOOK_EVERY_S: Final = 1.0
Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Material:
    """What the files hold, in PEM."""

    certificate: bytes | None
    """With the chain that leads to the authority's."""
    key: bytes | None
    authority: bytes | None
    """Certificates of those whose word is taken; None: those that gRPC comes with."""


class Certificates:
    """The files of one process. For a client alone, certificate and key may be missing."""

    def __init__(self, certificate: str = "", key: str = "", authority: str = "") -> None:
        """Reads them. Raises ConfigError naming the setting whose file cannot be used."""
        self._files = {"tls_cert": certificate, "tls_key": key, "tls_ca": authority}
        self._stamp: Stamp = ()
        self._looked_s = time.monotonic()
        self._complained = False
        self._lock = threading.Lock()
        self.generation = 0
        """Goes up with every change of the files that was taken over."""
        self.material = self._read()

    @classmethod
    def of(cls, settings: ProcessSettings) -> Certificates | None:
        """The files that the settings name; None where TLS is off. Raises ConfigError."""
        if not (settings.tls_cert or settings.tls_ca):
            return None
        return cls(settings.tls_cert, settings.tls_key, settings.tls_ca)

    def server_credentials(self, *, require_clients: bool) -> grpc.ServerCredentials:
        """What a server shows; with `require_clients`, it talks to clients of the authority's alone."""

        def configuration() -> grpc.ServerCertificateConfiguration:
            pairs = [(self.material.key or b"", self.material.certificate or b"")]
            return grpc.ssl_server_certificate_configuration(pairs, self.material.authority)

        served = self.generation

        def fetch() -> grpc.ServerCertificateConfiguration | None:  # on a thread of gRPC's
            nonlocal served
            self.look()
            if self.generation == served:
                return None
            served = self.generation
            return configuration()

        # None means no change; the stubs do not know
        fetcher = cast(Callable[[], grpc.ServerCertificateConfiguration], fetch)
        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            configuration(), fetcher, require_client_authentication=require_clients
        )
        return credentials

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """What a client shows, and of whom it takes certificates, now."""
        now = self.material
        return grpc.ssl_channel_credentials(now.authority, now.key, now.certificate)

    def look(self, *, at_most_every_s: float = 0.0) -> None:
        """Takes over files that have changed. From any thread."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s < at_most_every_s:
                return
            self._looked_s = now_s
            if self._stamps() != self._stamp:
                self._take_over()

    def _take_over(self) -> None:
        try:
            self.material = self._read()
        except ConfigError as error:
            if not self._complained:
                log.error("certificates stay as they were, as the new ones cannot be used: %s", error)
            self._complained = True
            return
        self._complained = False
        self.generation += 1
        log.info("certificates were read again, as they have changed")

    def _read(self) -> Material:
        """What the files hold, if it fits together. Raises ConfigError."""
        stamp = self._stamps()
        read: dict[str, bytes | None] = {}
        for setting, name in self._files.items():
            try:
                read[setting] = Path(name).read_bytes() if name else None
            except OSError as error:
                raise ConfigError(f"{setting}: {name} cannot be read: {error.strerror}") from error
        self._check()
        if self._stamps() != stamp:
            raise ConfigError("tls_cert, tls_key, tls_ca: a file changed while they were read")
        self._stamp = stamp
        return Material(read["tls_cert"], read["tls_key"], read["tls_ca"])

    def _check(self) -> None:
        """Holds the key against the certificate, and looks into the authority's file. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate, key, authority = self._files.values()
        try:
            if certificate:
                # without a password, or OpenSSL would ask the terminal for one
                context.load_cert_chain(certificate, key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"tls_cert, tls_key: {certificate} and {key} are no certificate and its key, in PEM and "
                f"without a password: {_reason(error)}"
            ) from None
        try:
            if authority:
                context.load_verify_locations(authority)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tls_ca: {authority} holds no certificates in PEM: {_reason(error)}") from None

    def _stamps(self) -> Stamp:
        """What tells one state of the files from another; zeros for one that is not there."""
        found = []
        for name in self._files.values():
            try:
                status = os.stat(name) if name else None
            except OSError:
                status = None
            found.append((status.st_mtime_ns, status.st_size, status.st_ino) if status else (0, 0, 0))
        return tuple(found)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__)
