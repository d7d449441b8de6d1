"""Images by URL: from hosts that the operator has listed, at public addresses, and from nowhere else.

Whoever can make a server fetch a URL of their choice speaks with the server's own network (SSRF). So:
- a host must be on the list, its scheme https (http by a setting), its port that of the scheme;
- its name is resolved once for each connection, *every* address it has must be public, and the connection
  goes to one that was checked: a name whose next answer is another address gains nothing (DNS rebinding);
- redirects are followed by hand, few of them, and each is looked at like the first URL;
- bytes, time, and what the answer says that it is, are bounded before anything is kept.

No cookies, no proxies of the environment, no credentials, nothing is decompressed. Knows no request.

Source: OWASP, Server-Side Request Forgery Prevention; IANA's special-purpose address registries.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import urljoin, urlsplit

import httpcore2

from hiprune.errors import InvalidInput

log = logging.getLogger("hiprune.gateway")

MAX_REDIRECTS: Final = 3
MAX_FETCHES: Final = 16
"""Connections at a time; more fetches wait, and their time runs."""
MAX_URL_CHARS: Final = 8192
MEDIA_TYPES: Final = ("image/jpeg", "image/png", "image/webp", "image/gif")
_PORTS: Final = {"https": 443, "http": 80}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_OK: Final = 200
_MAX_TRIED: Final = 4
"""Of a host's addresses, when the first ones do not answer."""
_NAME: Final = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HEADERS: Final = (
    ("accept", ", ".join(MEDIA_TYPES)),
    ("accept-encoding", "identity"),
    ("user-agent", "hiprune-gateway"),
)

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host, for a port."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, taken apart once: what is checked is what is fetched."""

    scheme: str
    host: str
    path: str
    """With the query."""

    @property
    def url(self) -> httpcore2.URL:
        """As the HTTP client takes it: in parts, so that it parses nothing."""
        return httpcore2.URL(scheme=self.scheme, host=self.host, port=None, target=self.path)


class Refused(Exception):
    """Why a URL is not fetched, or what came is not taken. The message is for the client."""

    def __init__(self, message: str, reason: str = "IMAGE_URL_REFUSED") -> None:
        super().__init__(message)
        self.reason = reason


class Fetcher:
    """Fetches images. One a process; belongs to its event loop."""

    def __init__(
        self,
        hosts: Sequence[str] = (),
        *,
        allow_http: bool = False,
        max_bytes: int = 20 * 2**20,
        timeout_s: float = 10.0,
        resolve: Resolve | None = None,
        network: httpcore2.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`hosts` are names, or `*.name` for all below one. `resolve` and `network` are the system's own."""
        self._hosts = frozenset(host for host in hosts if not host.startswith("*."))
        self._below = tuple(host[1:] for host in hosts if host.startswith("*."))
        self._schemes = ("https", "http") if allow_http else ("https",)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=MAX_FETCHES,
            max_keepalive_connections=0,
            network_backend=PublicNetwork(resolve or _resolve, network or httpcore2.AnyIOBackend()),
        )

    async def fetch(self, url: str, field: str) -> bytes:
        """The image behind a URL. `field` is the URL's in the request. Raises InvalidInput."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(url)
        except Refused as error:
            raise InvalidInput(str(error), reason=error.reason, field=field) from error
        except TimeoutError as error:
            raise InvalidInput(
                f"the image did not come within {self._timeout_s:g} s",
                reason="IMAGE_FETCH_FAILED",
                field=field,
            ) from error
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.TimeoutException,
            OSError,
        ) as error:
            raise InvalidInput(
                "the image cannot be fetched: its host cannot be reached, or does not speak HTTP",
                reason="IMAGE_FETCH_FAILED",
                field=field,
            ) from error

    async def close(self) -> None:
        """Hangs up."""
        await self._pool.aclose()

    def check(self, url: str) -> Target:
        """A URL that may be fetched, in its parts. Raises Refused."""
        if not (self._hosts or self._below):
            raise Refused("images are not fetched here: send them in the request, as a data: URL")
        if len(url) > MAX_URL_CHARS:
            raise Refused(f"{len(url)} characters of URL, expected at most {MAX_URL_CHARS}")
        if not all("!" <= char <= "~" and char != "\\" for char in url):
            raise Refused("the URL holds characters that no URL has unescaped")
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        except ValueError as error:
            raise Refused("is no URL") from error
        if scheme not in self._schemes:
            raise Refused(f"the URL's scheme is not {' or '.join(self._schemes)}, nor data")
        if "@" in parts.netloc:
            raise Refused("the URL holds credentials")
        if port not in (None, _PORTS[scheme]):
            raise Refused(f"the URL's port is {port}, expected {_PORTS[scheme]}")
        if not _NAME.fullmatch(host) or not (host in self._hosts or host.endswith(self._below)):
            raise Refused("images are not fetched from the URL's host")
        return Target(scheme, host, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))

    async def _follow(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = self.check(url)
            async with self._pool.stream(
                "GET", target.url, headers=list(_HEADERS), extensions={"timeout": self._timeouts()}
            ) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in _REDIRECTS:
                    url = urljoin(url, headers.get(b"location", b"").decode("latin-1"))
                    continue
                image = await self._read(response, headers)
            log.info("fetched an image of %d bytes from %s", len(image), target.host)
            return image
        raise Refused(f"the URL leads on more than {MAX_REDIRECTS} times", "IMAGE_FETCH_FAILED")

    async def _read(self, response: httpcore2.Response, headers: dict[bytes, bytes]) -> bytes:
        """The body, if it is an image and not too long. Raises Refused."""
        if response.status != _OK:
            raise Refused(f"the URL's host answered {response.status}", "IMAGE_FETCH_FAILED")
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind not in MEDIA_TYPES:
            raise Refused(
                f"what the URL leads to is not of the types {', '.join(MEDIA_TYPES)}", "IMAGE_FETCH_FAILED"
            )
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise Refused("the URL's host sent it compressed, which nobody asked for", "IMAGE_FETCH_FAILED")
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._max_bytes:
            raise self._too_long()
        image = bytearray()
        async for chunk in response.aiter_stream():
            image += chunk
            if len(image) > self._max_bytes:
                raise self._too_long()
        return bytes(image)

    def _too_long(self) -> Refused:
        return Refused(f"the image has more than {self._max_bytes} bytes", "LIMIT_EXCEEDED")

    def _timeouts(self) -> dict[str, float]:
        return dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_s)


class PublicNetwork(httpcore2.AsyncNetworkBackend):
    """Connections to public addresses alone. A name is resolved here and nowhere else."""

    def __init__(self, resolve: Resolve, network: httpcore2.AsyncNetworkBackend) -> None:
        self._resolve = resolve
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # its name upstream
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to one of the host's addresses. Raises Refused, ConnectError."""
        addresses = await self._resolve(host, port)
        if not all(is_public(each) for each in addresses):
            log.warning("%s has an address that is not public; nothing is fetched from it", host)
            raise Refused("images are not fetched from the URL's host")
        failed: Exception = httpcore2.ConnectError("no address")
        for address in addresses[:_MAX_TRIED]:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Never. Raises Refused."""
        raise Refused("images are not fetched from sockets")

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
"""IPv4 within IPv6, of networks that have IPv6 alone (RFC 6052)."""
_UNICAST: Final = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is given to anybody (RFC 4291): not mapped, compatible or local addresses."""
_TUNNELS: Final = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("2001::/32"))
"""6to4 and Teredo, which hold an IPv4 address that somebody else would connect to."""
_AZURE_HOST: Final = ipaddress.ip_address("168.63.129.16")
"""Looks public and is the machine below: within Azure the host's agent answers there, as 169.254.169.254 does
elsewhere (Microsoft, "What is IP address 168.63.129.16?")."""


def is_public(address: str) -> bool:
    """Whether an IP address is of a host on the public Internet, whatever it is wrapped in."""
    try:
        found = ipaddress.ip_address(address)  # one with a zone, fe80::1%eth0, is local and below
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            found = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        elif found not in _UNICAST or any(found in tunnel for tunnel in _TUNNELS):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved and found != _AZURE_HOST


async def _resolve(host: str, port: int) -> list[str]:
    """The system's own resolver, asked once. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
