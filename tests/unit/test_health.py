"""The health command of probes: real servers on this machine, as plain, socket and TLS."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hiprune.health import main, place
from hiprune.stack import free_port
from tests.certificates import Authority

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def serving(address: str, credentials: grpc.ServerCredentials | None = None) -> Iterator[None]:
    """A server that is alive and not ready."""
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.set("liveness", SERVING)
    servicer.set("", NOT_SERVING)
    if credentials is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, credentials)
    server.start()
    try:
        yield
    finally:
        server.stop(None)


def test_alive_and_ready_are_two_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"unix:{tmp_path}/encoder.sock"
    environ = {"HIPRUNE_ENCODER_LISTEN": address}
    with serving(address):
        assert main(["encoder", "liveness"], environ) == 0
        assert main(["encoder"], environ) == 1
        assert "NOT_SERVING" in capsys.readouterr().err
        assert main([address, "liveness"], {}) == 0
        assert main([address, "hiprune.v1.NobodysService"], {}) == 1
        assert "NOT_FOUND" in capsys.readouterr().err


def test_an_address_of_every_interface_is_asked_on_this_machine() -> None:
    port = free_port()
    with serving(f"127.0.0.1:{port}"):
        assert main(["llm", "liveness"], {"HIPRUNE_LLM_LISTEN": f"0.0.0.0:{port}", "http_proxy": "x"}) == 0


@pytest.mark.parametrize(
    ("listen", "asked"),
    [
        ("0.0.0.0:7", "127.0.0.1:7"),
        ("[::]:7", "[::1]:7"),
        ("10.0.0.1:7", "10.0.0.1:7"),
        ("unix:/a", "unix:/a"),
    ],
)
def test_the_address_is_where_the_service_was_told_to_listen(listen: str, asked: str) -> None:
    address, _, _ = place("encoder", {"HIPRUNE_ENCODER_LISTEN": listen})
    assert address == asked


def test_nobody_there_is_not_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"unix:{tmp_path}/nobody.sock"], {}) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["encoder", "liveness", "more"], ["../x"], ["encoder"]]
)
def test_a_command_that_means_nothing_is_no_answer_about_the_service(arguments: list[str]) -> None:
    assert main(arguments, {}) == 2


@pytest.mark.parametrize("wants_certificates", [False, True])
def test_a_service_with_tls_is_asked_by_its_own_certificate(tmp_path: Path, wants_certificates: bool) -> None:
    certificate, key, authority = Authority("ours").write(tmp_path / "ours")
    pair = [(Path(key).read_bytes(), Path(certificate).read_bytes())]
    credentials = grpc.ssl_server_credentials(
        pair,
        root_certificates=Path(authority).read_bytes() if wants_certificates else None,
        require_client_auth=wants_certificates,
    )
    port = free_port()
    environ = {
        "HIPRUNE_PRUNER_LISTEN": f"0.0.0.0:{port}",
        "HIPRUNE_PRUNER_TLS_CERT": certificate,
        "HIPRUNE_PRUNER_TLS_KEY": key,
    }
    with serving(f"127.0.0.1:{port}", credentials):
        assert main(["pruner", "liveness"], environ) == 0
        assert main(["pruner"], environ) == 1
        other, other_key, _ = Authority("theirs").write(tmp_path / "theirs")
        stranger = {**environ, "HIPRUNE_PRUNER_TLS_CERT": other, "HIPRUNE_PRUNER_TLS_KEY": other_key}
        assert main(["pruner", "liveness"], stranger) == 1


def test_the_command_imports_grpc_and_nothing_of_ours() -> None:
    code = (
        "import sys, hiprune.health; "
        "ours = {m for m in sys.modules if m.startswith('hiprune.') and m != 'hiprune.health'}; "
        "sys.exit(','.join(ours | ({'torch', 'numpy', 'pydantic', 'opentelemetry'} & set(sys.modules))) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@contextmanager
def answering(status: dict[str, int], *, certificate: str = "", key: str = "") -> Iterator[int]:
    """An HTTP server that answers each path with a status: its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[self.path])
            self.end_headers()

        def log_message(self, *said: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("tls", [False, True])
def test_the_gateway_is_asked_by_http(tmp_path: Path, tls: bool) -> None:
    certificate, key, _ = Authority("ours").write(tmp_path / "ours") if tls else ("", "", "")
    with answering({"/healthz": 200, "/readyz": 503}, certificate=certificate, key=key) as port:
        environ = {"HIPRUNE_GATEWAY_LISTEN": f"0.0.0.0:{port}", "HIPRUNE_GATEWAY_TLS_CERT": certificate}
        assert main(["gateway", "liveness"], environ) == 0
        assert main(["gateway"], environ) == 1
        if tls:
            other, _, _ = Authority("theirs").write(tmp_path / "theirs")
            assert main(["gateway", "liveness"], {**environ, "HIPRUNE_GATEWAY_TLS_CERT": other}) == 1
    assert main(["gateway", "liveness"], environ) == 1
