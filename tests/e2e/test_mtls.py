"""Claims about TLS between real processes: who is served, who is not, and how certificates are changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from hiprune import cli
from hiprune.auth import TENANT_HEADER
from hiprune.client import Client
from hiprune.config import ConfigError
from hiprune.errors import HipruneError, Unavailable
from hiprune.stack import SERVICES
from hiprune.trust import Certificates
from hiprune.v1 import encoder_service_pb2 as encoder_pb
from hiprune.v1 import (
    encoder_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    pruner_service_pb2_grpc,
)
from hiprune.v1 import pruner_service_pb2 as pruner_pb
from hiprune.v1.media_pb2 import Media
from tests.certificates import Authority, TlsStack
from tests.redis_servers import free_port
from tests.stacks import SAMPLES, picture

QUESTION = "count the shapes ."
IMAGE = picture("scene00.png")
AGE_MS = 1000
"""Age at which connections end, so that handshakes between services do not wait for ten minutes."""


class SecureStack(TlsStack):
    """The three services over TCP, each with a certificate of its own. Without a cache every request goes
    through all of them."""

    def __init__(self, folder: Path, authority: Authority, **environ: str) -> None:
        self.folders = {service: folder / service for service in SERVICES}
        self.addresses = {service: f"127.0.0.1:{free_port()}" for service in SERVICES}
        settings = {"HIPRUNE_PRUNER_CACHE": "off"}
        for service in SERVICES:
            certificate, key, trusted = authority.write(self.folders[service])
            settings |= {
                f"HIPRUNE_{service.upper()}_{name}": value
                for name, value in {
                    "LISTEN": self.addresses[service],
                    "TLS_CERT": certificate,
                    "TLS_KEY": key,
                    "TLS_CA": trusted,
                    "TLS_CLIENT_AUTH": "true",
                    "MAX_CONNECTION_AGE_MS": str(AGE_MS),
                }.items()
            }
        settings["HIPRUNE_PRUNER_ENCODER"] = self.addresses["encoder"]
        settings["HIPRUNE_LLM_PRUNER"] = self.addresses["pruner"]
        super().__init__(redis=False, environ={**settings, **environ})
        self.address = self.addresses["llm"]
        self.certificates = Certificates(*authority.write(folder / "client"))


@pytest.fixture(scope="module")
def ours() -> Authority:
    return Authority("ours")


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, ours: Authority) -> Iterator[SecureStack]:
    with SecureStack(tmp_path_factory.mktemp("mtls"), ours) as stack:
        yield stack


async def ask(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    async with Client(address, credentials=credentials, timeout_s=30) as client:
        return (await client.ask(QUESTION, IMAGE)).text


async def call(service: str, channel: grpc.aio.Channel) -> object:
    """One small request that each service answers to its peers."""
    if service == "encoder":
        encoder = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        request = encoder_pb.EncodeImageRequest(media=Media(image=IMAGE), layers=[1])
        return await encoder.EncodeImage(request, timeout=10, metadata=((TENANT_HEADER, "acme"),))
    if service == "pruner":
        pruner = pruner_service_pb2_grpc.PrunerServiceStub(channel)
        return await pruner.GetPruner(pruner_pb.GetPrunerRequest(), timeout=10)
    llm = llm_service_pb2_grpc.LanguageModelServiceStub(channel)
    return await llm.GetLanguageModel(llm_service_pb2.GetLanguageModelRequest(), timeout=10)


async def code_of(service: str, address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """The status that a caller gets: of a plain channel, which does not wait or try again."""
    channel = (
        grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    )
    async with channel:
        try:
            await call(service, channel)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def test_a_request_goes_through_all_three_and_a_peer_is_known_by_its_certificate(secure):
    credentials = secure.certificates.channel_credentials()
    assert await ask(secure.address, credentials)
    for service, address in secure.addresses.items():
        assert await code_of(service, address, credentials) is grpc.StatusCode.OK


@pytest.mark.parametrize("who", ["without a certificate", "in plain text", "of a stranger's authority"])
async def test_nobody_else_is_served_by_any_of_the_three(secure, ours, tmp_path, who):
    trusted = ours.write(tmp_path / "trusted")[2]
    credentials = {
        "without a certificate": lambda: Certificates(authority=trusted).channel_credentials(),
        "in plain text": lambda: None,
        "of a stranger's authority": lambda: Certificates(
            *Authority("theirs").write(tmp_path / "stranger")[:2], trusted
        ).channel_credentials(),
    }[who]()
    for service, address in secure.addresses.items():
        assert await code_of(service, address, credentials) is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(Unavailable):
        await ask(secure.address, credentials)


async def test_a_client_believes_no_server_of_another_authority(secure, ours, tmp_path):
    certificate, key, _ = ours.write(tmp_path / "client")
    _, _, wrong = Authority("theirs").write(tmp_path / "stranger")
    credentials = Certificates(certificate, key, wrong).channel_credentials()
    assert await code_of("llm", secure.address, credentials) is grpc.StatusCode.UNAVAILABLE


async def run_cli(address: str, *arguments: str):
    command = ["ask", str(SAMPLES / "scene00.png"), QUESTION, "--address", address, *arguments]
    return await asyncio.to_thread(CliRunner().invoke, cli.app, command)


async def test_the_command_shows_a_certificate_where_one_is_wanted(secure, ours, tmp_path):
    certificate, key, trusted = ours.write(tmp_path / "cli")
    whole = ["--tls-ca", trusted, "--tls-cert", certificate, "--tls-key", key]
    assert (await run_cli(secure.address, *whole)).exit_code == 0
    refused = await run_cli(secure.address, *whole[:2])
    assert (refused.exit_code, "UNAVAILABLE" in refused.stderr) == (1, True)
    for wrong, said in ((whole[:4], "--tls-key"), (["--tls-ca", key], "tls_ca"), (["--tls-ca", "no"], "no")):
        result = await run_cli(secure.address, *wrong)
        assert (result.exit_code, said in result.stderr) == (2, True)


@pytest.mark.extra
async def test_all_certificates_change_under_load_and_no_request_fails(secure, ours, tmp_path):
    """In the order that docs/security.md gives: trust both, show the new, trust the new alone."""
    new = Authority("new")
    client = tmp_path / "client"
    folders = [*secure.folders.values(), client]
    ours.write(client)
    failed: list[HipruneError] = []
    done = 0
    over = asyncio.Event()

    async def keep_asking() -> None:
        nonlocal done
        while not over.is_set():
            try:
                files = Certificates(*(str(client / name) for name in ("tls.crt", "tls.key", "ca.crt")))
                assert await ask(secure.address, files.channel_credentials())
            except ConfigError:
                continue  # one of the two files is new, and the other not yet
            except HipruneError as error:
                failed.append(error)
            done += 1

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():  # noqa: ASYNC110  # in another process
                await asyncio.sleep(0.05)

    def taken_over() -> int:
        """How often the service that has done so least has taken over new files."""
        return min(secure.log_of(service).count("certificates were read again") for service in SERVICES)

    asking = [asyncio.create_task(keep_asking()) for _ in range(2)]
    steps = 0

    async def all_have_seen_it() -> None:
        nonlocal steps
        steps += 1
        await until(lambda: taken_over() >= steps)
        before = done
        await until(lambda: done >= before + 4)  # and some requests more, by new connections

    try:
        both = _bundle(ours, new, tmp_path)
        for folder in folders:
            replace(folder / "ca.crt", both)
        await all_have_seen_it()
        for folder in folders:
            new.write(tmp_path / "fresh")
            replace_pair(folder, tmp_path / "fresh")
        await all_have_seen_it()
        for folder in folders:
            replace(folder / "ca.crt", (tmp_path / "fresh" / "ca.crt").read_bytes())
        await all_have_seen_it()
    finally:
        over.set()
        await asyncio.gather(*asking)
    assert not failed
    # who stayed with the old authority is a stranger now, everywhere
    stale = secure.certificates.channel_credentials()
    both_trusted = tmp_path / "both.crt"
    both_trusted.write_bytes(both)
    certificate, key, _ = ours.write(tmp_path / "stale")
    old_certificate = Certificates(certificate, key, str(both_trusted)).channel_credentials()
    for service, address in secure.addresses.items():
        assert await code_of(service, address, stale) is grpc.StatusCode.UNAVAILABLE
        assert await code_of(service, address, old_certificate) is grpc.StatusCode.UNAVAILABLE


def _bundle(one: Authority, other: Authority, folder: Path) -> bytes:
    return b"".join(Path(each.write(folder / each.name)[2]).read_bytes() for each in (one, other))


def replace(path: Path, content: bytes) -> None:
    """A file replaced as a whole, as whoever renews certificates does."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def replace_pair(folder: Path, fresh: Path) -> None:
    for name in ("tls.crt", "tls.key"):
        replace(folder / name, (fresh / name).read_bytes())
