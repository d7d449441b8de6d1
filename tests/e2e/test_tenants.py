"""Claims about tenants, limits and trust between services: real processes over TCP, real Redis, real keys."""

from __future__ import annotations

import asyncio
import base64
import itertools
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import openai
import pytest
from typer.testing import CliRunner

from hiprune import cli
from hiprune.auth import KEY_HEADER, PEER_HEADER, TENANT_HEADER
from hiprune.client import Client, question_message
from hiprune.errors import (
    Exhausted,
    HipruneError,
    InvalidInput,
    PermissionDenied,
    Unauthenticated,
    from_rpc,
)
from hiprune.stack import Stack
from hiprune.v1 import encoder_service_pb2 as encoder_pb
from hiprune.v1 import (
    encoder_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    pruner_service_pb2_grpc,
)
from hiprune.v1 import pruner_service_pb2 as pb
from hiprune.v1.media_pb2 import Media
from tests.stacks import SAMPLES, THIRD, picture

TOKEN = "canary-peer-token-0123456789"
QUESTION = "count the shapes ."
IMAGE = picture("scene00.png")
KEPT = THIRD

fresh = map("t{}".format, itertools.count()).__next__


class House:
    """The stack, its tenants file, and every error and key that came of it."""

    def __init__(self, stack: Stack, file: Path) -> None:
        self.stack = stack
        self.file = file
        self.keys: list[str] = []
        self.said: list[str] = []

    def tenant(self, *arguments: str) -> str:
        """Runs `hiprune tenant …` beside the services, which go on."""
        result = CliRunner().invoke(cli.app, ["tenant", *arguments, "--file", str(self.file)])
        assert result.exit_code == 0, result.output
        if key := result.stdout.strip():
            self.keys.append(key)
        return key

    async def add(self, *limits: str) -> str:
        """A new tenant's key, once the llm and the pruner know it."""
        key = self.tenant("add", fresh(), *limits)
        await self.until(lambda: self.is_known(key))
        return key

    async def is_known(self, key: str) -> bool:
        """Whether both services take the key."""
        return await self.services_that_know(key) == {"llm", "pruner"}

    async def is_unknown(self, key: str) -> bool:
        """Whether neither does: each looks at the file when it likes."""
        return not await self.services_that_know(key)

    async def services_that_know(self, key: str) -> set[str]:
        """The services that take the key, in a request that costs nothing."""
        metadata = ((KEY_HEADER, f"Bearer {key}"),)
        know = set()
        async with grpc.aio.insecure_channel(self.stack.address) as channel, self.pruner() as pruner:
            llm = llm_service_pb2_grpc.LanguageModelServiceStub(channel)
            asked = {
                "llm": llm.GetLanguageModel(llm_service_pb2.GetLanguageModelRequest(), metadata=metadata),
                "pruner": pruner.GetPruner(pb.GetPrunerRequest(), metadata=metadata),
            }
            for service, answer in asked.items():
                try:
                    await answer
                    know.add(service)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                        raise
        return know

    @staticmethod
    async def until(holds) -> None:
        async with asyncio.timeout(20):
            while not await holds():  # noqa: ASYNC110  # in another process
                await asyncio.sleep(0.05)

    async def ask(self, key: str = "", image: bytes = IMAGE, question: str = QUESTION, **fields):
        async with Client(self.stack.address, key=key) as client:
            return await client.ask(question, image, **fields)

    async def refusal(self, awaitable) -> HipruneError:
        with pytest.raises((HipruneError, grpc.aio.AioRpcError)) as refused:
            await awaitable
        error = refused.value
        found = error if isinstance(error, HipruneError) else from_rpc(error, peer="service")
        self.said.append(f"{found} {found.__cause__}")
        return found

    @asynccontextmanager
    async def pruner(self) -> AsyncIterator[pruner_service_pb2_grpc.PrunerServiceAsyncStub]:
        async with grpc.aio.insecure_channel(self.stack.pruner_address) as channel:
            yield pruner_service_pb2_grpc.PrunerServiceStub(channel)

    async def prune(self, *metadata: tuple[str, str], image: bytes = IMAGE, **fields):
        request = pb.PruneImageRequest(media=Media(image=image), **fields)
        async with self.pruner() as pruner:
            return await pruner.PruneImage(request, metadata=metadata, timeout=30)

    async def encode(self, *metadata: tuple[str, str]):
        request = encoder_pb.EncodeImageRequest(media=Media(image=IMAGE), layers=[1])
        async with grpc.aio.insecure_channel(self.stack.encoder_address) as channel:
            stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
            return await stub.EncodeImage(request, metadata=metadata, timeout=30)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    file = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    file.write_text("tenants: {}\n")
    file.chmod(0o600)
    encoder, pruner = (f"127.0.0.1:{port}" for port in free_ports(2))
    environ = {
        "HIPRUNE_ENCODER_LISTEN": encoder,
        "HIPRUNE_PRUNER_LISTEN": pruner,
        "HIPRUNE_PRUNER_ENCODER": encoder,
        "HIPRUNE_LLM_PRUNER": pruner,
        "HIPRUNE_LLM_TENANTS": str(file),
        "HIPRUNE_PRUNER_TENANTS": str(file),
    }
    for service in ("ENCODER", "PRUNER", "LLM"):
        environ[f"HIPRUNE_{service}_PEER_TOKEN"] = TOKEN
        environ[f"HIPRUNE_{service}_LOG_LEVEL"] = "debug"
    stack = Stack(environ=environ)
    stack.encoder_address, stack.pruner_address = encoder, pruner
    with stack:
        yield House(stack, file)


def by_key(key: str) -> tuple[str, str]:
    return KEY_HEADER, f"Bearer {key}"


# --- keys --------------------------------------------------------------------------------------------------


async def test_a_key_opens_the_door_and_nothing_else_does(house):
    key = await house.add()
    assert (await house.ask(key)).text
    altered = key[:-2] + ("A" if key[-2] != "A" else "B") + key[-1]
    for wrong, said in (("", "no API key"), (altered, "not known"), ("nonsense", "not known")):
        error = await house.refusal(house.ask(wrong))
        assert type(error) is Unauthenticated
        assert said in str(error)


async def test_the_command_takes_its_key_from_the_environment_or_a_flag(house):
    key = await house.add()
    arguments = ["ask", str(SAMPLES / "scene00.png"), QUESTION, "--address", house.stack.address]

    def run(*more: str, **environ: str):
        return CliRunner().invoke(cli.app, [*arguments, *more], env={"HIPRUNE_KEY": "", **environ})

    async def output(*more: str, **environ: str):
        result = await asyncio.to_thread(run, *more, **environ)
        house.said.append(result.output)
        return result

    assert (await output(HIPRUNE_KEY=key)).exit_code == 0
    assert (await output("--key", key)).exit_code == 0
    refused = await output()
    assert refused.exit_code == 1
    assert "UNAUTHENTICATED" in refused.stderr


async def test_keys_come_and_go_while_the_services_run(house):
    name = fresh()
    key = house.tenant("add", name)
    await house.until(lambda: house.is_known(key))
    assert (await house.ask(key)).text
    good = house.file.read_text()
    house.file.write_text("tenants: [\n")
    await house.until(lambda: said_in(house, "llm", "the tenants stay as they were"))
    assert (await house.ask(key)).text
    house.file.write_text(good)
    house.tenant("remove", name)
    await house.until(lambda: house.is_unknown(key))
    assert type(await house.refusal(house.ask(key))) is Unauthenticated


async def said_in(house: House, service: str, text: str) -> bool:
    return text in house.stack.log_of(service)


# --- limits ------------------------------------------------------------------------------------------------


def is_quota(error: HipruneError, limit: str) -> bool:
    return isinstance(error, Exhausted) and error.reason == "QUOTA" and limit in str(error)


async def test_requests_a_minute_end_in_a_refusal_that_says_when_to_come_back(house):
    key = await house.add("--requests-per-minute", "2")
    for _ in range(2):
        await house.ask(key)
    error = await house.refusal(house.ask(key))
    assert is_quota(error, "requests_per_minute: at most 2 a minute")
    assert 0 < error.retry_after_s <= 120
    at_the_pruner = await house.refusal(house.prune(by_key(key)))  # which counts in the same Redis
    assert is_quota(at_the_pruner, "requests_per_minute")


async def test_kept_tokens_a_minute_are_charged_once_at_whichever_service_is_first(house):
    key = await house.add("--tokens-per-minute", str(3 * KEPT + 10))
    await house.ask(key)
    await house.prune(by_key(key))  # a cache hit is charged as well: it is what the answer is worth
    error = await house.refusal(house.ask(key, policy=pb.PrunePolicy(keep_count=KEPT + 11)))
    assert is_quota(error, f"tokens_per_minute: at most {3 * KEPT + 10} a minute, and {KEPT + 11} more")
    assert 0 < error.retry_after_s <= 120
    await house.ask(key)
    error = await house.refusal(house.prune(by_key(key)))
    assert is_quota(error, "tokens_per_minute")
    error = await house.refusal(house.ask(key, policy=pb.PrunePolicy(method=pb.METHOD_NONE, keep_ratio=1)))
    assert is_quota(error, "tokens_per_minute")


async def test_tokens_come_back_when_nothing_was_generated(house):
    usage = (await house.ask(await house.add())).completion.usage
    async with grpc.aio.insecure_channel(house.stack.address) as channel:
        stub = llm_service_pb2_grpc.LanguageModelServiceStub(channel)
        metadata = (by_key(house.keys[-1]),)
        described = await stub.GetLanguageModel(llm_service_pb2.GetLanguageModelRequest(), metadata=metadata)
    # fits the context by itself and not with its picture: refused when that is pruned, its tokens reserved
    room = described.context_length - (usage.prompt_tokens - KEPT) - KEPT // 2
    long = " ".join([QUESTION] * (1 + room // len(QUESTION.split())))
    key = await house.add("--tokens-per-minute", str(KEPT))
    async with Client(house.stack.address, key=key) as client:
        request = llm_service_pb2.AskImageRequest(messages=[question_message(long, [IMAGE])])
        events = client.ask_stream(request)
        assert (await anext(events)).WhichOneof("event") == "report"
        error = await house.refusal(anext(events))
    assert (type(error), error.reason) == (InvalidInput, "LIMIT_EXCEEDED")
    await house.ask(key)
    assert is_quota(await house.refusal(house.ask(key)), "tokens_per_minute")


async def test_requests_at_a_time_are_bounded_and_the_next_is_let_in(house):
    key = await house.add("--concurrency", "1")
    encoder = house.stack.processes["encoder"]
    encoder.send_signal(signal.SIGSTOP)
    try:
        asked = {asyncio.create_task(house.ask(key, picture("scene01.png"))) for _ in range(2)}
        done, held = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=20)
    finally:
        encoder.send_signal(signal.SIGCONT)
    error = await house.refusal(done.pop())
    assert is_quota(error, "concurrency: 1 requests are running, at most 1")
    assert error.retry_after_s > 0
    assert (await held.pop()).text
    await house.ask(key)


async def test_a_default_policy_stands_for_what_the_request_leaves_unset(house):
    key = await house.add("--method", "strided", "--keep-count", "40")
    summary = (await house.ask(key)).report.media[0].summary
    assert (summary.policy.method, summary.tokens_kept) == (pb.METHOD_STRIDED, 40)
    asked = pb.PrunePolicy(keep_ratio=0.5)
    summary = (await house.ask(key, policy=asked)).report.media[0].summary
    assert (summary.policy.method, summary.tokens_kept) == (pb.METHOD_STRIDED, 288)
    summary = (await house.prune(by_key(key))).media.summary
    assert (summary.policy.method, summary.tokens_kept) == (pb.METHOD_STRIDED, 40)


@pytest.mark.parametrize("limit", ["--max-image-bytes=100", "--max-image-pixels=100"])
async def test_the_largest_image_is_refused_by_field_and_limit(house, limit):
    key = await house.add(limit)
    error = await house.refusal(house.ask(key))
    assert (type(error), error.reason) == (InvalidInput, "LIMIT_EXCEEDED")
    assert error.field == "messages[0].parts[0].media.image"
    assert limit.strip("-").split("=")[0].replace("-", "_") in str(error)
    direct = await house.refusal(house.prune(by_key(key)))
    assert (type(direct), direct.field) == (InvalidInput, "media.image")


# --- trust between services --------------------------------------------------------------------------------


async def test_a_client_cannot_name_a_tenant(house):
    key = await house.add()
    async with grpc.aio.insecure_channel(house.stack.address) as channel:
        stub = llm_service_pb2_grpc.LanguageModelServiceStub(channel)
        for metadata in (((TENANT_HEADER, "t0"),), ((TENANT_HEADER, "t0"), by_key(key))):
            call = stub.GetLanguageModel(llm_service_pb2.GetLanguageModelRequest(), metadata=metadata)
            assert type(await house.refusal(call)) is PermissionDenied
    for metadata in (((TENANT_HEADER, "t0"),), ((TENANT_HEADER, "t0"), by_key(key))):
        assert type(await house.refusal(house.prune(*metadata))) is PermissionDenied
        assert type(await house.refusal(house.encode(*metadata))) is PermissionDenied


async def test_strangers_are_refused_at_the_encoder_and_at_the_pruner(house):
    assert type(await house.refusal(house.encode())) is Unauthenticated
    assert type(await house.refusal(house.prune())) is Unauthenticated
    wrong = (PEER_HEADER, TOKEN + "0")
    assert type(await house.refusal(house.encode(wrong))) is PermissionDenied
    assert type(await house.refusal(house.prune(wrong))) is PermissionDenied
    assert (await house.encode((PEER_HEADER, TOKEN))).views
    named = ((PEER_HEADER, TOKEN), (TENANT_HEADER, "t0"))
    assert (await house.encode(*named)).views
    assert (await house.prune(*named)).media.views


async def test_tenants_share_no_entry_of_the_cache(house):
    one, other = await house.add(), await house.add()
    image = picture("scene02.png")

    async def status(key: str) -> int:
        return (await house.ask(key, image)).report.media[0].cache

    assert [await status(one), await status(one)] == [pb.CACHE_STATUS_MISS, pb.CACHE_STATUS_PRUNED_HIT]
    assert [await status(other), await status(other)] == [pb.CACHE_STATUS_MISS, pb.CACHE_STATUS_PRUNED_HIT]


# --- over HTTP ---------------------------------------------------------------------------------------------


async def test_a_key_and_its_limits_hold_through_the_gateway(house):
    key = await house.add("--requests-per-minute", "1")
    url = f"http://{await asyncio.to_thread(house.stack.start_gateway)}/v1"
    data = base64.b64encode(IMAGE).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    turn = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}

    async def ask(api_key: str):
        async with openai.AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0) as client:
            return await client.chat.completions.create(model="llava", messages=[turn])

    assert (await ask(key)).choices[0].message.content
    with pytest.raises(openai.RateLimitError) as refused:
        await ask(key)
    assert refused.value.code == "quota"
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 120
    with pytest.raises(openai.AuthenticationError):
        await ask("nonsense")
    house.said.append(house.stack.log_of("gateway"))
    house.stack.end("gateway")


# --- what is left behind: these two come last --------------------------------------------------------------


async def test_with_redis_gone_each_service_counts_for_itself(house):
    key = await house.add("--requests-per-minute", "2")
    house.stack.end("redis", signal.SIGKILL)
    for _ in range(2):
        assert (await house.ask(key)).text
    assert is_quota(await house.refusal(house.ask(key)), "requests_per_minute")
    assert house.stack.log_of("llm").count("limits are counted in this process alone") == 1


def test_no_key_and_no_token_is_in_any_log_or_error(house):
    """Logs at level debug, and whatever the tests above were answered with."""
    texts = [house.stack.log_of(service) for service in ("llm", "pruner", "encoder")] + house.said
    assert len(house.keys) > 5
    assert all("Traceback" not in text for text in texts[:3]), texts[:3]
    for secret in (*(key.split("_", 2)[2] for key in house.keys), TOKEN):
        assert not any(secret in text for text in texts)
    assert house.file.read_text()
    for key in house.keys:
        assert key.split("_", 2)[2] not in house.file.read_text()
