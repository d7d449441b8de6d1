"""`python -m hiprune.health encoder [liveness]`: asks a service how it is, for probes that run a command.

For Docker's HEALTHCHECK, and for Kubernetes where its own gRPC probes do not reach: a Unix socket, TLS. Ends
with 0 if the service says SERVING; with 1 and one line of why if it says anything else, or nothing within
3 s; with 2 for a command that means nothing.

The service is named, and its address and certificate are read from the variables that it was started with
(`HIPRUNE_ENCODER_LISTEN`, `HIPRUNE_ENCODER_TLS_CERT`, …); a flag that it was started with is not seen. Or an
address is given, HOST:PORT or unix:PATH. Without `liveness`, the question is whether it is ready. The gateway
is asked by HTTP.

Runs every few seconds beside a service that has better things to do, so it imports gRPC and nothing of ours.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S: Final = 3.0

_BY_HTTP: Final = {"gateway": {"": "/readyz", "liveness": "/healthz"}}
"""Services that do not speak gRPC, and the path of each question."""
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "*": "127.0.0.1"}  # noqa: S104  # not to bind


class NotServing(Exception):
    """The service is not as it should be; the message says how it is."""


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code."""
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    whom, name = arguments[0], "".join(arguments[1:])
    try:
        address, certificate, key = place(whom, environ)
    except ValueError as error:
        print(f"hiprune.health: {error}", file=sys.stderr)
        return 2
    try:
        if whom in _BY_HTTP:
            ask_by_http(address, _BY_HTTP[whom].get(name, name), certificate)
        else:
            ask(address, name, certificate, key)
    except NotServing as error:
        print(f"{whom}: {error}", file=sys.stderr)
        return 1
    return 0


def place(whom: str, environ: Mapping[str, str]) -> tuple[str, str, str]:
    """The address of a service, or the one given, and the files of its certificate and key; empty: no TLS.

    Raises ValueError.
    """
    if ":" in whom:
        return whom, "", ""
    if not re.fullmatch(r"[a-z]+", whom):
        raise ValueError(f"{whom!r} is no service's name and no address: HOST:PORT or unix:PATH")
    prefix = f"HIPRUNE_{whom.upper()}_"
    listen = environ.get(f"{prefix}LISTEN", "")
    if not listen:
        raise ValueError(f"{prefix}LISTEN is not set, which says where {whom} is")
    if listen.startswith("unix:"):
        return listen, "", ""
    host, _, port = listen.rpartition(":")
    return (
        f"{_EVERYWHERE.get(host, host)}:{port}",
        environ.get(f"{prefix}TLS_CERT", ""),
        environ.get(f"{prefix}TLS_KEY", ""),
    )


def ask(address: str, name: str = "", certificate: str = "", key: str = "") -> None:
    """Returns if the service at an address says that `name` is SERVING; raises NotServing otherwise.

    With a `certificate`, the service must show that very one, whatever name it is for; with it and its `key`
    we show it too.
    """
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    try:
        if certificate:
            own, secret = Path(certificate).read_bytes(), Path(key).read_bytes()
            options.append(("grpc.ssl_target_name_override", _name_in(address, certificate, key)))
            credentials = grpc.ssl_channel_credentials(own, secret, own)
            channel = grpc.secure_channel(address, credentials, options)
        else:
            channel = grpc.insecure_channel(address, options)
    except OSError as error:
        raise NotServing(str(error)) from error
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise NotServing(f"{error.code().name}: {error.details()}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise NotServing(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def ask_by_http(address: str, path: str, certificate: str = "") -> None:
    """Returns if the service answers a GET of `path` with 200; raises NotServing otherwise.

    With a `certificate`, it must show that very one.
    """
    connection = HTTPConnection("localhost", timeout=TIMEOUT_S)
    try:
        if address.startswith("unix:"):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(TIMEOUT_S)
            connection.sock.connect(address.removeprefix("unix:"))
        else:
            plain = _connect(address)
            connection.sock = _trusting(certificate).wrap_socket(plain) if certificate else plain
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        raise NotServing(str(error) or type(error).__name__) from error
    finally:
        connection.close()
    if status != 200:
        raise NotServing(f"{path}: {status}")


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S)


def _trusting(certificate: str) -> ssl.SSLContext:
    """TLS with whoever shows that certificate, whatever name it is for. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # this certificate is all the authority there is
    context.load_verify_locations(certificate)
    return context


def _name_in(address: str, certificate: str, key: str) -> str:
    """A name that the certificate which the service shows was made for: gRPC wants one. Raises OSError."""
    context = _trusting(certificate)
    context.load_cert_chain(certificate, key, password="")
    context.set_alpn_protocols(["h2"])
    with _connect(address) as plain, context.wrap_socket(plain) as secured:
        shown: dict[str, Any] = secured.getpeercert() or {}
    names = [value for kind, value in shown.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    return str(names[0]).replace("*", "any") if names else "localhost"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
