"""Claims about certificates from files: what is refused at the start, and what a change of them does."""

from __future__ import annotations

import logging

import grpc
import pytest

from hiprune import auth, calls
from hiprune.auth import KEY_HEADER, PEER_HEADER, TENANT_HEADER, Caller, Rules, Tenant
from hiprune.calls import connect
from hiprune.config import ConfigError, ServiceSettings
from hiprune.door import Door
from hiprune.errors import Internal, Unauthenticated
from hiprune.server import RequestGate
from hiprune.trust import Certificates
from hiprune.v1 import encoder_service_pb2 as pb
from hiprune.v1 import encoder_service_pb2_grpc
from tests.certificates import Authority

TOKEN = "a token of sixteen and more"


class Greeter(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Answers, and notes what came along."""

    async def GetEncoder(self, request, context):
        self.metadata = dict(context.invocation_metadata())
        return pb.GetEncoderResponse()

    def register(self, server: grpc.aio.Server) -> None:
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)


@pytest.fixture
async def start():
    """Starts a server on a free port: its address. With files, TLS and client authentication are on."""
    servers = []

    async def begin(files: Certificates | None = None, rules: Rules | None = None, greeter=None) -> str:
        gate = RequestGate(30, Door(rules, certified=files is not None))
        gate.open()
        server = grpc.aio.server(interceptors=[gate])
        servers.append(server)
        (greeter or Greeter()).register(server)
        if files is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", files.server_credentials(require_clients=True))
        await server.start()
        return f"127.0.0.1:{port}"

    yield begin
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


async def test_only_who_has_a_certificate_of_the_authority_is_served(start, tmp_path):
    ours, theirs = Authority("ours"), Authority("theirs")
    address = await start(Certificates(*ours.write(tmp_path / "server")))
    assert await is_served(address, Certificates(*ours.write(tmp_path / "client")))
    stranger = theirs.write(tmp_path / "stranger")
    assert not await is_served(address, Certificates(*stranger[:2], ours.write(tmp_path / "client")[2]))
    assert not await is_served(address, Certificates("", "", ours.write(tmp_path / "client")[2]))
    assert not await is_served(address, Certificates(*stranger))  # who does not take the server's word either


async def test_a_new_authority_takes_the_place_of_the_old_one_without_a_restart(start, tmp_path):
    old, new = Authority("old"), Authority("new")
    served = old.write(tmp_path / "server")
    address = await start(Certificates(*served))
    was, will = (Certificates(*each.write(tmp_path / each.name)) for each in (old, new))
    assert await is_served(address, was)
    assert not await is_served(address, will)
    new.write(tmp_path / "server")
    assert await is_served(address, will)
    assert not await is_served(address, was)


async def test_files_that_do_not_fit_change_nothing_until_they_do(start, tmp_path, caplog):
    old, new = Authority("old"), Authority("new")
    served = old.write(tmp_path / "server")
    client = Certificates(*old.write(tmp_path / "client"))
    files = Certificates(*served)
    address = await start(files)
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


async def test_a_service_calls_with_its_new_certificate_once_it_has_one(start, tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "LOOK_EVERY_S", 0)
    old, new = Authority("old"), Authority("new")
    certificate, key, authority = old.write(tmp_path / "pruner")
    before = await start(Certificates(*old.write(tmp_path / "encoder")))
    peer = peer_at(before, tls_cert=certificate, tls_key=key, tls_ca=authority)
    assert await greet(peer)
    was = peer._channel
    assert await greet(peer)
    assert peer._channel is was
    # the other side's certificate is renewed first, then ours
    new.write(tmp_path / "encoder")
    new.write(tmp_path / "pruner")
    assert await greet(peer)
    assert peer._channel is not was
    await peer.close()


def peer_at(address: str, **settings: str) -> calls.Peer[encoder_service_pb2_grpc.EncoderServiceStub]:
    stub = encoder_service_pb2_grpc.EncoderServiceStub
    return calls.Peer("encoder", address, stub, ServiceSettings(**settings))


async def greet(peer: calls.Peer[encoder_service_pb2_grpc.EncoderServiceStub]) -> pb.GetEncoderResponse:
    return await peer.call(lambda stub: stub.GetEncoder, pb.GetEncoderRequest(), pb.GetEncoderResponse)


async def test_a_service_that_another_does_not_trust_is_at_fault_and_not_its_client(start):
    peer = peer_at(await start(rules=Rules(peer_token=TOKEN, peers_only=True)))
    with pytest.raises(Internal, match="the encoder does not trust this service") as refused:
        await greet(peer)
    assert isinstance(refused.value.__cause__, Unauthenticated)
    await peer.close()


@pytest.mark.parametrize(
    ("settings", "sent"),
    [({}, {}), ({"peer_token": TOKEN}, {PEER_HEADER: TOKEN, TENANT_HEADER: "acme"})],
)
async def test_a_tenant_is_named_to_those_alone_who_can_believe_it(start, settings, sent):
    greeter = Greeter()
    peer = peer_at(await start(rules=Rules(**settings), greeter=greeter), **settings)
    auth.enter(Caller(Tenant("acme")))
    await greet(peer)
    ours = (KEY_HEADER, PEER_HEADER, TENANT_HEADER)
    assert {name: value for name, value in greeter.metadata.items() if name in ours} == sent
    await peer.close()
