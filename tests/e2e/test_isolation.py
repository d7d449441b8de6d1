"""Claims about what tenants can learn of each other, with real processes and a real Redis: nothing.

Between pruner and encoder stands a relay that notes for whom the encoder is asked. So whether one tenant's
request was answered from another's is counted, and not read off a clock.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import redis
from typer.testing import CliRunner

from hiprune import cli
from hiprune.auth import KEY_HEADER, TENANT_HEADER
from hiprune.client import Client, question_message
from hiprune.trust import Certificates
from hiprune.v1 import llm_service_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from tests.certificates import Authority, TlsStack
from tests.stacks import SAMPLES, picture

QUESTION = "which colour is the canary circle ?"
SECRET = "a cache secret of the tests"
PLUS_PLUS = pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS)
MISS, ENCODED, PRUNED = pb.CACHE_STATUS_MISS, pb.CACHE_STATUS_ENCODED_HIT, pb.CACHE_STATUS_PRUNED_HIT
TENANTS = ("canary-alice", "canary-bob")
LIMITS = ("--requests-per-minute", "10000", "--tokens-per-minute", "1000000", "--concurrency", "100")


class Relay(grpc.GenericRpcHandler):
    """Passes every call on to the encoder as it came, and notes for which tenants it was to encode."""

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder
        self.asked: list[str] = []
        self.wanted: frozenset[str] = frozenset()
        """Tenants that must all have asked before any is answered."""
        self._all_here = threading.Condition()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if not details.method.startswith("/hiprune."):
            return None
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._pass_on(details.method, request, context)
        )

    def _pass_on(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        metadata = [each for each in context.invocation_metadata() if each.key.startswith("x-hiprune-")]
        if method.endswith("/EncodeImage"):
            with self._all_here:
                self.asked += [each.value for each in metadata if each.key == TENANT_HEADER]
                self._all_here.notify_all()
                self._all_here.wait_for(lambda: self.wanted <= set(self.asked), timeout=20)
        with grpc.insecure_channel(self.encoder) as channel:
            try:
                return channel.unary_unary(method)(request, metadata=metadata, timeout=30)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())


class House:
    """The stack, its two tenants' keys and the relay."""

    def __init__(self, stack: TlsStack, keys: dict[str, str], relay: Relay) -> None:
        self.stack = stack
        self.keys = keys
        self.relay = relay

    def client(self, tenant: str) -> Client:
        credentials = self.stack.certificates.channel_credentials()
        return Client(self.stack.address, key=self.keys[tenant], credentials=credentials)

    async def ask(self, tenant: str, image: bytes, question: str = QUESTION):
        """What the cache knew, and the tenants for whom the encoder was asked because of this."""
        before = len(self.relay.asked)
        async with self.client(tenant) as client:
            answer = await client.ask(question, image, policy=PLUS_PLUS)
        assert answer.text
        return answer.report.media[0].cache, self.relay.asked[before:]

    def redis(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=self.stack.redis_url.removeprefix("unix://"))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("isolation")
    certificate, private, trusted = Authority("ours").write(folder)
    tenants, relay_address = folder / "tenants.yaml", f"unix:{folder}/relay.sock"
    keys = {
        name: CliRunner()
        .invoke(cli.app, ["tenant", "add", name, "--file", str(tenants), *LIMITS])
        .stdout.strip()
        for name in TENANTS
    }
    stack = TlsStack(
        environ={
            "HIPRUNE_PRUNER_ENCODER": relay_address,
            "HIPRUNE_PRUNER_SHARED_MEMORY_DIR": "",
            "HIPRUNE_PRUNER_CACHE_SECRET": SECRET,
            "HIPRUNE_LLM_TENANTS": str(tenants),
            "HIPRUNE_LLM_TLS_CERT": certificate,
            "HIPRUNE_LLM_TLS_KEY": private,
        }
    )
    stack.addresses = {"llm": stack.address}
    stack.certificates = Certificates(authority=trusted)
    relay = Relay(stack.encoder_address)
    server = grpc.server(ThreadPoolExecutor(8), handlers=[relay])
    server.add_insecure_port(relay_address)
    server.start()
    try:
        with stack:
            yield House(stack, keys, relay)
    finally:
        server.stop(None)


# --- the way in --------------------------------------------------------------------------------------------


async def test_a_front_door_with_tls_takes_keys_of_clients_without_certificates(house, tmp_path):
    trusted = tmp_path / "ca.crt"
    trusted.write_bytes(house.stack.certificates.material.authority)
    key = house.keys[TENANTS[0]]

    async def ask(*arguments: str):
        command = ["ask", str(SAMPLES / "scene00.png"), QUESTION, "--address", house.stack.address]
        return await asyncio.to_thread(CliRunner().invoke, cli.app, [*command, *arguments])

    assert (await ask("--tls-ca", str(trusted), "--key", key)).exit_code == 0
    for arguments, said in ((["--tls-ca", str(trusted)], "UNAUTHENTICATED"), (["--key", key], "UNAVAILABLE")):
        refused = await ask(*arguments)
        assert (refused.exit_code, said in refused.stderr) == (1, True)


# --- the cache ---------------------------------------------------------------------------------------------


async def test_what_one_tenant_has_asked_saves_another_nothing(house):
    alice, bob = TENANTS
    image, unseen = picture("scene03.png"), picture("scene04.png")
    assert await house.ask(alice, image) == (MISS, [alice])
    assert await house.ask(alice, image) == (PRUNED, [])
    assert await house.ask(alice, image, "count the shapes .") == (ENCODED, [])
    assert await house.ask(bob, image) == (MISS, [bob])
    assert await house.ask(bob, unseen) == (MISS, [bob])


async def test_tenants_who_ask_the_same_at_once_do_not_wait_for_each_other(house):
    """Neither is answered before the encoder was asked for both; who shared the other's run would wait in
    vain. Of one tenant's two, one asks."""
    image = picture("scene05.png")
    before = len(house.relay.asked)
    house.relay.asked, asked_before = [], house.relay.asked
    house.relay.wanted = frozenset(TENANTS)
    try:
        await asyncio.gather(*(house.ask(tenant, image) for tenant in TENANTS * 2))
        assert sorted(house.relay.asked) == sorted(TENANTS)
    finally:
        house.relay.wanted = frozenset()
        house.relay.asked = asked_before + house.relay.asked
    assert len(house.relay.asked) == before + 2


async def test_redis_shows_no_name_no_question_and_no_picture(house):
    image = picture("scene06.png")
    with house.redis() as client:
        client.flushall()
        for tenant in TENANTS:
            await house.ask(tenant, image)
        async with asyncio.timeout(20):
            # entries are stored behind the answer, by another process
            while len(entries := sorted(client.scan_iter("hiprune:v1:{*}:[ep]:*"))) < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        keys = list(client.scan_iter("*"))
        values = {key: client.get(key) for key in entries}
        written = b"\n".join([*keys, *values.values(), *_members(client, set(keys) - set(entries))])
    # each tenant has a prefix of its own, and below it nothing that the other has
    split = [key.split(b":") for key in entries]
    prefixes = {parts[2] for parts in split}
    assert len(prefixes) == 2
    assert len({parts[-1] for parts in split}) == 4
    assert {(parts[2], parts[3]) for parts in split} == {
        (each, kind) for each in prefixes for kind in (b"e", b"p")
    }
    assert len(set(values.values())) == 4
    # and limits are counted there as well
    assert any(b"requests_per_minute" in key for key in keys)
    digests = [hashlib.sha256(text).digest() for text in (image, QUESTION.encode())]
    told = [
        *(name.encode() for name in TENANTS),
        *(hashlib.sha256(name.encode()).hexdigest()[:16].encode() for name in TENANTS),
        QUESTION.encode(),
        b"canary",
        *digests,
        *(digest.hex().encode() for digest in digests),
        *(image[place : place + 16] for place in range(64, len(image) - 64, 128)),
        SECRET.encode(),
        *(key.split("_", 2)[2].encode() for key in house.keys.values()),
    ]
    assert not [each for each in told if each in written]


def _members(client: redis.Redis, keys: set[bytes]) -> list[bytes]:
    """All that other keys than the cache's entries hold: counters, tickets, the books of tenants' shares."""
    found: list[bytes] = []
    for key in keys:
        match client.type(key):
            case b"string":
                found.append(client.get(key) or b"")
            case b"zset":
                found += client.zrange(key, 0, -1)
            case b"hash":
                found += [part for pair in client.hgetall(key).items() for part in pair]
    return found


async def test_forgetting_one_tenant_leaves_the_other_its_entries(house):
    alice, bob = TENANTS
    image = picture("scene07.png")
    for tenant in TENANTS:
        await house.ask(tenant, image)
        async with asyncio.timeout(20):
            while await house.ask(tenant, image) != (PRUNED, []):
                pass
    environ = {"HIPRUNE_PRUNER_REDIS_URL": house.stack.redis_url, "HIPRUNE_PRUNER_CACHE_SECRET": SECRET}
    purge = ["cache", "purge", "--tenant", alice]
    done = await asyncio.to_thread(CliRunner().invoke, cli.app, purge, env=environ)
    assert done.exit_code == 0, done.output
    assert await house.ask(alice, image) == (MISS, [alice])
    assert await house.ask(bob, image) == (PRUNED, [])


async def test_a_client_names_neither_a_tenant_nor_an_entry(house):
    """Fields and metadata that the wire does not know change nothing; the one header that names a tenant is
    refused."""
    alice, bob = TENANTS
    image = picture("scene08.png")
    await house.ask(alice, image)
    with house.redis() as client:
        keys = [key.decode() for key in client.scan_iter("hiprune:v1:{*}:p:*")]
    request = llm_service_pb2.AskImageRequest(
        messages=[question_message(QUESTION, [image])], policy=PLUS_PLUS
    )
    wire = request.SerializeToString()
    for number, value in enumerate((alice, *keys[:4])):
        tag = (1000 + number) << 3 | 2
        wire += bytes((tag & 127 | 128, tag >> 7)) + bytes((len(value),)) + value.encode()
    unknown = tuple((name, keys[0]) for name in ("x-hiprune-cache-key", "cache-key", "x-request-id"))
    mine = ((KEY_HEADER, f"Bearer {house.keys[bob]}"), ("tenant", alice), ("x-hiprune-tenant-id", alice))
    credentials = house.stack.certificates.channel_credentials()
    async with grpc.aio.secure_channel(house.stack.address, credentials) as channel:
        ask = channel.unary_stream(
            "/hiprune.v1.ImageQaService/AskImage",
            response_deserializer=llm_service_pb2.AskImageResponse.FromString,
        )
        events = [event async for event in ask(wire, metadata=(*mine, *unknown), timeout=30)]
        assert events[0].report.media[0].cache == MISS
        assert house.relay.asked[-1] == bob
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(wire, metadata=(*mine, (TENANT_HEADER, alice)), timeout=30).read()
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert house.relay.asked[-1] == bob


def test_nothing_that_the_services_log_names_a_question_or_a_key(house):
    for service in house.stack.processes:
        text = house.stack.log_of(service)
        assert QUESTION not in text
        assert not any(key in text for key in house.keys.values())
