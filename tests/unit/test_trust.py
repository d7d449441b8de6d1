"""Claims about certificates from files: what is refused at the start, and what a change of them does."""

from __future__ import annotations

import logging

import grpc
import pytest

from hiprune.client import connect
from hiprune.config import ConfigError
from hiprune.trust import Certificates
from hiprune.v1 import encoder_service_pb2 as pb
from hiprune.v1 import encoder_service_pb2_grpc
from tests.certificates import Authority


class Greeter(encoder_service_pb2_grpc.EncoderServiceServicer):
    async def GetEncoder(self, request, context):
        return pb.GetEncoderResponse()


@pytest.fixture
async def serve_tls():
    """A server with TLS and client authentication, on a free port: its address."""
    servers = []

    async def start(files: Certificates) -> str:
        server = grpc.aio.server()
        servers.append(server)
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(Greeter(), server)
        port = server.add_secure_port("127.0.0.1:0", files.server_credentials(require_clients=True))
        await server.start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


async def is_served(address: str, files: Certificates) -> bool:
    async with connect(address, credentials=files.channel_credentials()) as channel:
        try:
            await encoder_service_pb2_grpc.EncoderServiceStub(channel).GetEncoder(
                pb.GetEncoderRequest(), timeout=5
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True


async def test_only_who_has_a_certificate_of_the_authority_is_served(serve_tls, tmp_path):
    ours, theirs = Authority("ours"), Authority("theirs")
    address = await serve_tls(Certificates(*ours.write(tmp_path / "server")))
    assert await is_served(address, Certificates(*ours.write(tmp_path / "client")))
    stranger = theirs.write(tmp_path / "stranger")
    assert not await is_served(address, Certificates(*stranger[:2], ours.write(tmp_path / "client")[2]))
    assert not await is_served(address, Certificates("", "", ours.write(tmp_path / "client")[2]))
    assert not await is_served(address, Certificates(*stranger))  # who does not take the server's word either


async def test_a_new_authority_takes_the_place_of_the_old_one_without_a_restart(serve_tls, tmp_path):
    old, new = Authority("old"), Authority("new")
    served = old.write(tmp_path / "server")
    address = await serve_tls(Certificates(*served))
    was, will = (Certificates(*each.write(tmp_path / each.name)) for each in (old, new))
    assert await is_served(address, was)
    assert not await is_served(address, will)
    new.write(tmp_path / "server")
    assert await is_served(address, will)
    assert not await is_served(address, was)


async def test_files_that_do_not_fit_change_nothing_until_they_do(serve_tls, tmp_path, caplog):
    old, new = Authority("old"), Authority("new")
    served = old.write(tmp_path / "server")
    client = Certificates(*old.write(tmp_path / "client"))
    files = Certificates(*served)
    address = await serve_tls(files)
    certificate = new.write(tmp_path / "new")
    with caplog.at_level(logging.ERROR, "hiprune.trust"):
        (tmp_path / "server" / "tls.crt").write_bytes((tmp_path / "new" / "tls.crt").read_bytes())
        assert await is_served(address, client)
        assert await is_served(address, client)
        (tmp_path / "server" / "tls.crt").unlink()
        assert await is_served(address, client)
    assert len(caplog.records) == 1
    assert "stay as they were" in caplog.text
    new.write(tmp_path / "server")
    assert await is_served(address, Certificates(*certificate))
    assert files.generation == 1


def test_files_that_cannot_be_used_are_refused_at_the_start_by_setting(tmp_path):
    certificate, key, authority = Authority("ours").write(tmp_path / "a")
    other_key = Authority("other").write(tmp_path / "b")[1]
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    for files, setting in (
        ((certificate, other_key, authority), "tls_cert, tls_key"),
        ((certificate, str(empty), authority), "tls_cert, tls_key"),
        ((certificate, key, str(empty)), "tls_ca"),
        ((certificate, key, key), "tls_ca"),
        ((str(tmp_path / "none"), key, authority), "tls_cert"),
    ):
        with pytest.raises(ConfigError, match=f"^{setting}: "):
            Certificates(*files)
