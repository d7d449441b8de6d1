"""The gateway's settings and its socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hiprune.config import ConfigError
from services.gateway import exchange
from services.gateway.process import bind
from services.gateway.settings import Settings


def test_hosts_are_read_from_a_list():
    read = Settings.read([], {"HIPRUNE_GATEWAY_IMAGE_HOSTS": " images.example, *.CDN.example ,"})
    assert read.hosts == ("images.example", "*.cdn.example")
    assert Settings().hosts == ()


@pytest.mark.parametrize(
    "hosts", ["https://images.example", "images.example:443", "*", "a b", "*.*.example", "a/b"]
)
def test_what_is_no_list_of_hosts_is_refused(hosts):
    with pytest.raises(ConfigError, match="image_hosts"):
        Settings.read(["--image-hosts", hosts], {})


def test_the_bodies_held_fit_the_containers_memory():
    needed = 4 * Settings().max_held_bytes + 256 * 2**20
    assert needed <= 2**30
    assert "${HIPRUNE_GATEWAY_MEMORY:-1g}" in Path("docker-compose.yml").read_text()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (503, "overloaded", "RESOURCE_EXHAUSTED"),
        (503, "draining", "UNAVAILABLE"),
        (429, "quota", "RESOURCE_EXHAUSTED"),
        (400, "invalid_field", "INVALID_ARGUMENT"),
    ],
)
def test_an_error_counts_as_it_does_at_the_llm(status, code, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(exchange.telemetry, "observe", lambda *_, **labels: seen.append(labels["code"]))
    monkeypatch.setattr(exchange.telemetry, "count", lambda *_, **labels: seen.append(labels["code"]))
    with exchange.Exchange("POST", "/v1/chat/completions", {}, "AskImage") as it:
        it.failed(status, code)
    assert seen == [expected, expected]


def test_beyond_this_machine_it_may_listen_as_the_llm_is_asked_who_may_come():
    assert Settings.read(["--listen", "0.0.0.0:8080"], {}).listen == "0.0.0.0:8080"


def test_a_certificate_without_its_key_is_refused():
    with pytest.raises(ConfigError, match="tls_key"):
        Settings.read(["--tls-cert", "a.crt"], {})


def test_nagles_algorithm_is_off_for_connections_that_asyncio_takes():
    # asyncio looks at the protocol's number, which accepted sockets have of the one that listens
    with bind("127.0.0.1:0") as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_an_address_that_is_taken_is_a_setting_that_is_wrong(tmp_path: Path):
    for first in ("127.0.0.1:0", f"unix:{tmp_path}/gateway.sock"):
        with bind(first) as listening:
            name = listening.getsockname()
            again = f"unix:{name}" if isinstance(name, str) else f"{name[0]}:{name[1]}"
            with pytest.raises(ConfigError, match="cannot be bound"):
                bind(again)
    # a socket's file that nobody serves on is in nobody's way
    bind(f"unix:{tmp_path}/gateway.sock").close()
