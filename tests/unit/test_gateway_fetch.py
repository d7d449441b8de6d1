"""What the gateway fetches, and what it must not. Servers of this machine play those of public addresses."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import httpcore2
import pytest

from hiprune.errors import InvalidInput
from services.gateway import fetch
from services.gateway.fetch import Fetcher, is_public
from tests.certificates import Authority

PUBLIC = "93.184.216.34"
HOST = "images.example"
IMAGE = b"\x89PNG and more"
Answer = Callable[[str], AsyncIterator[bytes] | list[bytes]]


class World:
    """A resolver and a network: public addresses lead to servers of this machine, and all is noted."""

    def __init__(self) -> None:
        self.names: dict[str, list[list[str]]] = {}
        """The answers to be given for a name, one after the other; the last one stays."""
        self.ports: dict[tuple[str, int], int] = {}
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.requests: list[str] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    @asynccontextmanager
    async def serves(
        self, answer: Answer, address: str = PUBLIC, port: int = 443, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[None]:
        """A server that answers a request's first line with what `answer` makes of it."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                parts = answer(head.split(" ")[1])
                async for part in parts if isinstance(parts, AsyncIterator) else _each(parts):
                    writer.write(part)
                    await writer.drain()
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        self.ports[address, port] = server.sockets[0].getsockname()[1]
        async with server:
            yield

    def fetcher(self, *hosts: str, **options: object) -> Fetcher:
        options = {"allow_http": True, "timeout_s": 5.0, **options}
        return Fetcher(hosts or (HOST,), resolve=self.resolve, network=Network(self), **options)


class Network(httpcore2.AsyncNetworkBackend):
    """Connects where the world says; an address without a server does not answer."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._real = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # its name upstream
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        self._world.connected.append((host, port))
        if (host, port) not in self._world.ports:
            raise httpcore2.ConnectError("refused")
        return await self._real.connect_tcp("127.0.0.1", self._world.ports[host, port], timeout)


async def _each(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def ok(body: bytes = IMAGE, kind: str = "image/png", **headers: str) -> list[bytes]:
    lines = {"content-type": kind, "content-length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return [f"HTTP/1.1 200 OK\r\n{head}\r\n".encode(), body]


def redirect(to: str) -> list[bytes]:
    return [f"HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n".encode()]


@pytest.fixture
def world() -> World:
    made = World()
    made.names[HOST] = [[PUBLIC]]
    return made


async def refusal(fetcher: Fetcher, url: str) -> InvalidInput:
    with pytest.raises(InvalidInput) as refused:
        await fetcher.fetch(url, "field")
    await fetcher.close()
    assert refused.value.field == "field"
    return refused.value


# --- what is fetched ---------------------------------------------------------------------------------------


async def test_an_image_of_a_listed_host_is_fetched_and_its_name_is_asked_for_once(world):
    fetcher = world.fetcher()
    async with world.serves(lambda path: ok(path.encode()), port=80):
        assert await fetcher.fetch(f"http://{HOST}/a.png?size=2#part", "field") == b"/a.png?size=2"
    assert world.resolved == [HOST]
    assert world.connected == [(PUBLIC, 80)]
    (head,) = world.requests
    sent = {line.partition(":")[0].lower() for line in head.splitlines()[1:] if line}
    assert sent == {"host", "accept", "accept-encoding", "user-agent"}
    assert f"Host: {HOST}\r\n" in head
    await fetcher.close()


async def test_over_https_the_certificate_must_be_the_hosts(world, tmp_path: Path):
    certificate, key, authority = Authority("test").write(tmp_path)  # for localhost alone
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate, key)
    trusted = ssl.create_default_context(cafile=authority)
    world.names["localhost"] = [[PUBLIC]]
    fetcher = world.fetcher(HOST, "localhost", ssl_context=trusted)
    async with world.serves(lambda path: ok(), tls=served):
        assert await fetcher.fetch("https://localhost/", "field") == IMAGE
        assert (await refusal(fetcher, f"https://{HOST}/")).reason == "IMAGE_FETCH_FAILED"
    assert len(world.requests) == 1


async def test_the_second_address_is_tried_when_the_first_does_not_answer(world):
    world.names[HOST] = [["93.184.216.1", PUBLIC]]
    fetcher = world.fetcher()
    async with world.serves(lambda path: ok(), port=80):
        assert await fetcher.fetch(f"http://{HOST}/", "field") == IMAGE
    assert world.connected == [("93.184.216.1", 80), (PUBLIC, 80)]
    await fetcher.close()


@pytest.mark.parametrize("host", ["a.cdn.example", "b.a.cdn.example"])
async def test_a_star_lists_all_names_below_one_and_not_the_one(world, host):
    world.names = {name: [[PUBLIC]] for name in (host, "cdn.example", "evilcdn.example")}
    async with world.serves(lambda path: ok(), port=80):
        fetcher = world.fetcher("*.cdn.example")
        assert await fetcher.fetch(f"http://{host}/", "field") == IMAGE
        for other in ("cdn.example", "evilcdn.example"):
            await refusal(fetcher, f"http://{other}/")
    assert world.resolved == [host]


async def test_redirects_within_the_list_are_followed(world):
    world.names["other.example"] = [["93.184.216.35"]]
    pages = {"/1": redirect("/2"), "/2": redirect("//other.example/3")}
    fetcher = world.fetcher(HOST, "other.example")
    async with (
        world.serves(lambda path: pages[path], port=80),
        world.serves(lambda path: ok(), "93.184.216.35", 80),
    ):
        assert await fetcher.fetch(f"http://{HOST}/1", "field") == IMAGE
    assert world.resolved == [HOST, HOST, "other.example"]
    await fetcher.close()


# --- what is not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "gopher://images.example/",
        "ftp://images.example/a.png",
        "//images.example/a.png",
        "images.example/a.png",
        "",
        "http://other.example/",
        "http://images.example.other.example/",
        "http://images.example:8080/",
        "http://images.example:22/",
        "http://images.example:99999/",
        "http://user@images.example/",
        "http://user:password@images.example/",
        "http://images.example@other.example/",
        "http://other.example\\@images.example/",
        "http://images.example\\.other.example/",
        "http://images.example /",
        "http://images.example/a b",
        "http://images.example/\r\nhost: other",
        "http://images.example/\u00e9",
        "http://\u2139mages.example/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://images.example./",
        "http://images.example/" + "a" * 9000,
    ],
)
async def test_a_url_that_is_not_a_listed_hosts_is_refused_before_anything_is_asked(world, url):
    assert (await refusal(world.fetcher(), url)).reason == "IMAGE_URL_REFUSED"
    assert not world.resolved
    assert not world.connected


async def test_without_a_list_nothing_is_fetched(world):
    fetcher = Fetcher(resolve=world.resolve, network=Network(world))
    assert "data: URL" in str(await refusal(fetcher, f"https://{HOST}/"))
    assert not world.resolved


async def test_http_is_refused_unless_it_is_allowed(world):
    await refusal(world.fetcher(allow_http=False), f"http://{HOST}/")
    assert not world.resolved


PRIVATE = [
    *("127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
    *("168.63.129.16", "64:ff9b::a83f:8110"),  # the host below, in Azure
    *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
    *("64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:0a00:0001::1", "2001:0:7f00:1::", "2001:db8::1"),
    *("localhost", "", "1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_public_is_told_whatever_it_is_wrapped_in(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::808:808"]
)
def test_what_is_public_is_told(address):
    assert is_public(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1"])
@pytest.mark.parametrize("beside", [[], [PUBLIC]])
async def test_a_name_with_an_address_that_is_not_public_is_not_connected_to(world, address, beside):
    world.names[HOST] = [[*beside, address]]
    async with world.serves(lambda path: ok(), port=80), world.serves(lambda path: ok(), address, 80):
        assert (await refusal(world.fetcher(), f"http://{HOST}/")).reason == "IMAGE_URL_REFUSED"
    assert not world.connected


async def test_a_name_that_changes_its_address_between_check_and_connection_gains_nothing(world):
    # DNS rebinding: public when it is looked at, this machine when it is asked for once more
    world.names[HOST] = [[PUBLIC], ["127.0.0.1"]]
    fetcher = world.fetcher()
    async with world.serves(lambda path: ok(), port=80), world.serves(lambda path: ok(), "127.0.0.1", 80):
        assert await fetcher.fetch(f"http://{HOST}/", "field") == IMAGE
        assert world.connected == [(PUBLIC, 80)]
        # the next fetch asks again, and sees it
        await refusal(fetcher, f"http://{HOST}/")
    assert world.connected == [(PUBLIC, 80)]


async def test_a_name_that_changes_its_address_over_a_redirect_gains_nothing(world):
    world.names[HOST] = [[PUBLIC], ["127.0.0.1"]]
    async with world.serves(lambda path: redirect("/again"), port=80):
        assert (await refusal(world.fetcher(), f"http://{HOST}/")).reason == "IMAGE_URL_REFUSED"
    assert world.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "http://other.example/",
        "http://images.example:22/",
        "http://user@images.example/",
    ],
)
async def test_a_redirect_is_looked_at_like_the_first_url(world, to):
    async with world.serves(lambda path: redirect(to), port=80):
        assert (await refusal(world.fetcher(), f"http://{HOST}/")).reason == "IMAGE_URL_REFUSED"
    assert len(world.connected) == 1


async def test_a_redirect_from_https_to_http_needs_http_to_be_allowed(world, tmp_path: Path):
    certificate, key, authority = Authority("test").write(tmp_path)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate, key)
    trusted = ssl.create_default_context(cafile=authority)
    world.names["localhost"] = [[PUBLIC]]
    fetcher = world.fetcher("localhost", allow_http=False, ssl_context=trusted)
    async with world.serves(lambda path: redirect("http://localhost/"), tls=served):
        assert (await refusal(fetcher, "https://localhost/")).reason == "IMAGE_URL_REFUSED"


async def test_redirects_without_an_end_are_given_up(world):
    async with world.serves(lambda path: redirect("/again"), port=80):
        assert (await refusal(world.fetcher(), f"http://{HOST}/")).reason == "IMAGE_FETCH_FAILED"
    assert len(world.requests) == 1 + fetch.MAX_REDIRECTS


# --- what comes back ---------------------------------------------------------------------------------------


async def test_a_body_that_says_it_is_too_long_is_not_read(world):
    async with world.serves(lambda path: [ok()[0].replace(b": 13", b": 1000001")], port=80):
        error = await refusal(world.fetcher(max_bytes=1_000_000), f"http://{HOST}/")
    assert error.reason == "LIMIT_EXCEEDED"


async def test_a_body_that_never_ends_is_cut_at_the_bound(world):
    sent = 0

    async def endless(path: str) -> AsyncIterator[bytes]:
        nonlocal sent
        yield b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n"
        while True:
            yield bytes(2**16)
            sent += 2**16

    async with world.serves(endless, port=80):
        error = await refusal(world.fetcher(max_bytes=2**20), f"http://{HOST}/")
    assert error.reason == "LIMIT_EXCEEDED"
    assert sent < 2**26  # what sockets hold, besides


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n"])
async def test_an_answer_that_drips_is_given_up_in_time(world, begun):
    async def drip(path: str) -> AsyncIterator[bytes]:
        yield begun
        for _ in range(1000):
            yield b"H"
            await asyncio.sleep(0.02)

    async with world.serves(drip, port=80):
        error = await refusal(world.fetcher(timeout_s=0.2), f"http://{HOST}/")
    assert error.reason == "IMAGE_FETCH_FAILED"
    assert "within" in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        ok(kind="text/html"),
        ok(kind="image/svg+xml"),
        ok(kind=""),
        ok(content_encoding="gzip"),
        [b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"],
        [b"HTTP/1.1 206 Partial Content\r\ncontent-type: image/png\r\ncontent-length: 0\r\n\r\n"],
        [b"SSH-2.0-OpenSSH_9\r\n"],
        [],
        [b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 100\r\n\r\nshort"],
        [b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 40_000],
    ],
)
async def test_what_is_no_image_is_not_taken(world, answer):
    async with world.serves(lambda path: answer, port=80):
        error = await refusal(world.fetcher(), f"http://{HOST}/")
    assert error.reason == "IMAGE_FETCH_FAILED"
