"""Claim: no secret, and nothing that a client sent or got, is in a log, an error, a trace, a metric, a
command line, what a service tells of itself, or Redis.

Every secret, and everything personal in a request, holds a canary of its own. Then as much as possible goes
wrong, with every service at log level debug, and all that can be read afterwards is searched.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from hiprune import cache_keys, cli
from hiprune.auth import KEY_HEADER, PEER_HEADER, TENANT_HEADER
from hiprune.client import Client
from hiprune.errors import HipruneError
from hiprune.stack import SERVICES
from hiprune.trust import Certificates
from hiprune.v1 import encoder_service_pb2 as encoder_pb
from hiprune.v1 import encoder_service_pb2_grpc, llm_service_pb2, pruner_service_pb2_grpc
from hiprune.v1 import pruner_service_pb2 as pb
from hiprune.v1.media_pb2 import Media
from tests import otlp
from tests.certificates import Authority, TlsStack
from tests.redis_servers import free_port
from tests.stacks import SAMPLES

pytestmark = pytest.mark.extra

PEER_TOKEN = "canarypeertoken0123456789"
CACHE_SECRET = "canarycachesecret0123456789"
REDIS_PASSWORD = "canaryredispassword"
OTLP_HEADER = "canaryotlpheader"
ASKED = "canaryquestion"
QUESTION = f"what shape is orange ? {ASKED}"
IN_PICTURE = "canaryinthepicture"
PLUS_PLUS = pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS)


def tagged_picture() -> bytes:
    """A sample with canaries wherever a PNG has room for words: text, compressed text, EXIF."""
    with Image.open(SAMPLES / "scene06.png") as image:
        words = PngImagePlugin.PngInfo()
        words.add_text("Comment", IN_PICTURE)
        words.add_text(IN_PICTURE, "as a keyword")
        words.add_text("Author", IN_PICTURE, zip=True)
        words.add_itxt("Title", IN_PICTURE)
        exif = image.getexif()
        exif[0x010E] = IN_PICTURE  # ImageDescription
        exif[0x9286] = b"ASCII\0\0\0" + IN_PICTURE.encode()  # UserComment
        out = io.BytesIO()
        image.save(out, "PNG", pnginfo=words, exif=exif)
    assert out.getvalue().count(IN_PICTURE.encode()) >= 4
    return out.getvalue()


class House:
    """The stack, and everything that anybody was told."""

    collector: otlp.Collector
    ports: dict[str, int]
    """Where each service's metrics are."""

    def __init__(
        self, stack: TlsStack, folder: Path, redis_process: subprocess.Popen[bytes], url: str
    ) -> None:
        self.stack = stack
        self.folder = folder
        self.redis_process = redis_process
        self.redis_path = url.removeprefix("unix://")
        self.key = ""
        self.image = tagged_picture()
        self.answers: set[str] = set()
        self.said: list[str] = []
        self.codes: set[str] = set()

    async def ask(self, question: str = QUESTION, image: bytes | None = None, **options) -> None:
        """Asks, and keeps what came: the answer apart, what an error says with all the rest."""
        key = options.pop("key", self.key)
        credentials = self.stack.certificates.channel_credentials()
        async with Client(self.stack.address, key=key, credentials=credentials, timeout_s=15) as client:
            try:
                answer = await client.ask(question, image or self.image, **{"policy": PLUS_PLUS, **options})
            except HipruneError as error:
                self.note(error)
            else:
                self.answers.add(answer.text)
                self.said.append(f"{answer.report}{answer.completion}")

    def note(self, error: BaseException) -> None:
        rpc = error if isinstance(error, grpc.aio.AioRpcError) else error.__cause__
        assert isinstance(rpc, grpc.aio.AioRpcError)
        self.codes.add(rpc.code().name)
        self.said.append(f"{error} {rpc.details()} {rpc.debug_error_string()} {rpc.trailing_metadata()}")

    @asynccontextmanager
    async def noting(self) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            self.note(error)

    def redis(self, password: str = REDIS_PASSWORD) -> redis.Redis:
        return redis.Redis(unix_socket_path=self.redis_path, password=password)

    def secrets(self) -> dict[str, str]:
        """What must be nowhere, by what it is."""
        digest = hashlib.sha256(self.image).hexdigest()
        tenant_secret = cache_keys.tenant_secret(CACHE_SECRET.encode(), "acme").hex()
        return {
            "peer token": PEER_TOKEN,
            "cache secret": CACHE_SECRET,
            "tenant's own secret": tenant_secret,
            "redis password": REDIS_PASSWORD,
            "otlp header": OTLP_HEADER,
            "api key": self.key.split("_", 2)[2],
            "question": ASKED,
            "picture's words": IN_PICTURE,
            "picture's digest": digest,
            **{f"answer {each}": each for each in self.answers},
        }

    def leaks(self, *texts: str) -> list[str]:
        return [what for what, secret in self.secrets().items() if any(secret in text for text in texts)]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with otlp.running() as collector:
        yield from furnished(tmp_path_factory, collector)


def furnished(tmp_path_factory: pytest.TempPathFactory, collector: otlp.Collector) -> Iterator[House]:
    from tests.conftest import spawn_redis

    folder = tmp_path_factory.mktemp("canaries")
    url, process = spawn_redis(folder / "redis.sock", "--requirepass", REDIS_PASSWORD)
    with_password = url.replace("unix://", f"unix://:{REDIS_PASSWORD}@")
    certificate, private, trusted = Authority("ours").write(folder / "tls")
    encoder, pruner = (f"127.0.0.1:{free_port()}" for _ in range(2))
    ports = {service: free_port() for service in SERVICES}
    environ = {
        "HIPRUNE_ENCODER_LISTEN": encoder,
        "HIPRUNE_PRUNER_LISTEN": pruner,
        "HIPRUNE_PRUNER_ENCODER": encoder,
        "HIPRUNE_LLM_PRUNER": pruner,
        "HIPRUNE_PRUNER_CACHE": "redis",
        "HIPRUNE_PRUNER_REDIS_URL": with_password,
        "HIPRUNE_PRUNER_CACHE_SECRET": CACHE_SECRET,
        "HIPRUNE_LLM_TLS_CERT": certificate,
        "HIPRUNE_LLM_TLS_KEY": private,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {OTLP_HEADER}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    }
    for service in SERVICES:
        environ |= {
            f"HIPRUNE_{service.upper()}_{name}": value
            for name, value in {
                "LOG_LEVEL": "debug",
                "LOG_FORMAT": "text" if service == "encoder" else "json",
                "PEER_TOKEN": PEER_TOKEN,
                "LIMITS_REDIS_URL": with_password,
                # where nobody listens for the one, which has to say so
                "OTLP_ENDPOINT": f"127.0.0.1:{free_port()}" if service == "encoder" else collector.address,
                "METRICS_LISTEN": f"127.0.0.1:{ports[service]}",
                "TENANTS": "" if service == "encoder" else str(folder / "tenants.yaml"),
            }.items()
        }
    added = CliRunner().invoke(
        cli.app, ["tenant", "add", "acme", "--file", str(folder / "tenants.yaml"), "--concurrency", "8"]
    )
    stack = TlsStack(redis=False, environ=environ)
    stack.encoder_address, stack.pruner_address = encoder, pruner
    stack.addresses = {"llm": stack.address}
    stack.certificates = Certificates(authority=trusted)
    try:
        with stack:
            made = House(stack, folder, process, url)
            made.key = added.stdout.strip()
            made.collector, made.ports = collector, ports
            yield made
    finally:
        process.kill()
        process.wait()


# --- the trouble; the searches come behind it --------------------------------------------------------------


async def test_answers_come_and_are_worth_a_search(house):
    await house.ask()
    await house.ask()
    assert house.answers
    assert all(len(answer) > 4 for answer in house.answers)


async def test_bad_input_of_many_kinds_is_refused(house):
    cut, noise = house.image[: len(house.image) // 2], IN_PICTURE.encode() * 50
    long = f"{ASKED} " * 6000
    await house.ask(image=cut)
    await house.ask(image=noise)
    await house.ask(question=long)
    await house.ask(question=f"{QUESTION} <image>")
    plain = pb.PrunePolicy(method=pb.METHOD_HIPRUNE)
    await house.ask(question=f"{ASKED} " * 2000, policy=plain)  # fits the limit and not the context
    await house.ask(policy=pb.PrunePolicy(keep_ratio=7))
    await house.ask(policy=pb.PrunePolicy(object_layer=99))
    await house.ask(model="another-model")
    await house.ask(sampling=llm_service_pb2.Sampling(temperature=-1))
    await house.ask(sampling=llm_service_pb2.Sampling(max_tokens=0))
    assert {"INVALID_ARGUMENT", "NOT_FOUND"} <= house.codes


async def test_wrong_keys_and_headers_are_refused(house):
    await house.ask(key="")
    await house.ask(key=house.key[:-2] + "xx")
    await house.ask(key=f"{house.key} {house.key}")
    mine = (KEY_HEADER, f"Bearer {house.key}")
    wrong: tuple[tuple[tuple[str, str], ...], ...] = (
        (mine, mine),
        (mine, (TENANT_HEADER, "acme")),
        ((PEER_HEADER, PEER_TOKEN + "0"),),
        ((KEY_HEADER, house.key),),
        ((PEER_HEADER, PEER_TOKEN), (TENANT_HEADER, "No Name")),
        (mine,),  # the encoder has no tenants
    )
    for address, stub, method, request in (
        (
            house.stack.pruner_address,
            pruner_service_pb2_grpc.PrunerServiceStub,
            "PruneImage",
            pb.PruneImageRequest(media=Media(image=house.image), question=QUESTION),
        ),
        (
            house.stack.encoder_address,
            encoder_service_pb2_grpc.EncoderServiceStub,
            "EncodeImage",
            encoder_pb.EncodeImageRequest(media=Media(image=house.image), layers=[99]),
        ),
    ):
        async with grpc.aio.insecure_channel(address) as channel:
            for metadata in wrong:
                async with house.noting():
                    await getattr(stub(channel), method)(request, metadata=metadata, timeout=10)
            # bytes that are no message, with a question in them
            raw = channel.unary_unary(f"/hiprune.v1.{method.replace('Prune', 'Pruner')}")
            async with house.noting():
                await raw(QUESTION.encode(), metadata=(mine,), timeout=10)
            real = {"PruneImage": "PrunerService/PruneImage", "EncodeImage": "EncoderService/EncodeImage"}[
                method
            ]
            async with house.noting():
                call = channel.unary_unary(f"/hiprune.v1.{real}")
                await call(QUESTION.encode(), metadata=((PEER_HEADER, PEER_TOKEN),), timeout=10)
    assert {"UNAUTHENTICATED", "PERMISSION_DENIED"} <= house.codes


async def test_nothing_in_redis_names_anything(house):
    with house.redis() as client:
        assert list(client.scan_iter("hiprune:v1:{*}:p:*"))
        found = []
        for key in client.scan_iter("*"):
            found.append(key.decode("latin-1"))
            if client.type(key) == b"string":
                found.append((client.get(key) or b"").decode("latin-1"))
        slow = str(client.slowlog_get(128))
    assert not house.leaks(*found, slow)
    assert not any("acme" in text for text in found)


async def test_a_redis_with_another_password_and_one_that_is_gone_stop_nobody(house):
    with house.redis() as client:
        client.config_set("requirepass", "another one")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    answered = len(house.said)
    for _ in range(3):
        await house.ask()
        await asyncio.sleep(0.3)
    house.redis_process.kill()
    house.redis_process.wait()
    for _ in range(3):
        await house.ask()
    assert len(house.said) == answered + 6
    assert "Redis fails" in house.stack.log_of("pruner")
    assert "their Redis fails" in house.stack.log_of("llm")


async def test_a_certificate_that_is_none_is_complained_of(house):
    file = house.folder / "tls" / "tls.crt"
    good = file.read_bytes()
    file.write_bytes(
        b"-----BEGIN CERTIFICATE-----\n" + IN_PICTURE.encode() + b"\n-----END CERTIFICATE-----\n"
    )
    await house.ask()
    key_file = house.folder / "tls" / "tls.key"
    secret = key_file.read_text().splitlines()[2]
    assert "certificates stay as they were" in house.stack.log_of("llm")
    assert secret not in house.stack.log_of("llm")
    file.write_bytes(good)


async def test_a_tenants_file_that_breaks_is_complained_of(house):
    file = house.folder / "tenants.yaml"
    good = file.read_text()
    file.write_text(good.replace("sha256: ", f"sha256: {house.key} #", 1))  # a key where its hash should be
    async with asyncio.timeout(20):
        while "the tenants stay as they were" not in house.stack.log_of("llm"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    file.write_text(good)
    await house.ask()


async def test_an_encoder_that_is_gone_is_unavailable(house):
    house.stack.processes["encoder"].send_signal(signal.SIGKILL)
    house.stack.processes["encoder"].wait()
    with Image.open(io.BytesIO(house.image)) as image:
        turned = io.BytesIO()
        image.rotate(90).save(turned, "PNG")
    await house.ask(image=turned.getvalue())
    assert "UNAVAILABLE" in house.codes


# --- the searches ------------------------------------------------------------------------------------------


def test_no_log_holds_a_canary(house):
    for service in SERVICES:
        text = house.stack.log_of(service)
        assert re.search(r' DEBUG |"level": "debug"', text), (
            f"the {service} logs no details, so proves nothing"
        )
        assert not house.leaks(text), service


def test_nothing_that_a_collector_or_a_scraper_gets_holds_a_canary(house):
    names = {span.name for span in house.collector.spans}
    assert {"AskImage", "PruneImage", "select", "text", "prefill"} <= names
    assert any(span.status == 2 for span in house.collector.spans), "no span of an error proves nothing"
    assert house.collector.metrics
    sent = [request.decode("latin-1") for request in house.collector.raw]
    assert not house.leaks(*sent)
    for service in ("pruner", "llm"):
        for accept in ("text/plain", "application/openmetrics-text"):
            url = f"http://127.0.0.1:{house.ports[service]}/metrics"
            with urllib.request.urlopen(
                urllib.request.Request(url, headers={"Accept": accept}), timeout=10
            ) as answer:
                page = answer.read().decode()
            assert "hiprune_errors_total{" in page
            assert not house.leaks(page)


def test_no_error_holds_a_canary(house):
    """Nor the answer, nor the question: an error says where it was wrong, and not what."""
    assert len(house.said) > 25
    assert not house.leaks(*house.said)


def test_no_command_line_holds_a_canary(house):
    lines = [
        Path(f"/proc/{process.pid}/cmdline").read_text("utf-8", "replace")
        for name, process in house.stack.processes.items()
        if process.poll() is None
    ]
    assert len(lines) == 2
    assert not house.leaks(*lines)


async def test_health_and_reflection_tell_nothing(house):
    found = []
    credentials = house.stack.certificates.channel_credentials()
    for address in (house.stack.address, house.stack.pruner_address):
        secure = address == house.stack.address
        async with (
            grpc.aio.secure_channel(address, credentials) if secure else grpc.aio.insecure_channel(address)
        ) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            found.append(str(await health.Check(health_pb2.HealthCheckRequest(), timeout=5)))
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="hiprune.v1.PrunerService"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="hiprune.v1.ImageQaService"),
            ]
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            async for answer in stub.ServerReflectionInfo(iter(asked), timeout=5):
                found.append(answer.SerializeToString().decode("latin-1"))
    assert len(found) == 8
    assert not house.leaks(*found)
    assert not any("acme" in text for text in found)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--max-frames", "0"],
        ["--redis-url", f"nonsense://:{REDIS_PASSWORD}@host", "--cache", "redis"],
        ["--limits-redis-url", f"redis://:{REDIS_PASSWORD}@host:port"],
        ["--peer-token", "canarypeertoke"],
        ["--cache-secret", "canarycachesec", "--cache", "redis"],
        ["--tls-cert", "missing.pem", "--tls-key", "missing.pem"],
    ],
)
def test_help_and_a_wrong_setting_tell_nothing(house, arguments):
    environ = {
        **os.environ,
        "HIPRUNE_PRUNER_LISTEN": "127.0.0.1:0",
        "HIPRUNE_PRUNER_LOG_LEVEL": "debug",
        "HIPRUNE_PRUNER_PEER_TOKEN": PEER_TOKEN,
        "HIPRUNE_PRUNER_CACHE_SECRET": CACHE_SECRET,
        "HIPRUNE_PRUNER_REDIS_URL": f"redis://:{REDIS_PASSWORD}@127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {OTLP_HEADER}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.pruner", *arguments],
        env=environ,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == (0 if arguments == ["--help"] else 2), done.stderr
    said = done.stdout + done.stderr
    assert said
    assert not house.leaks(said)
    assert "canarypeertoke" not in said
    assert "canarycachesec" not in said
