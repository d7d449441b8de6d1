"""Pages in a browser that are watched: what they log, whom they ask, and what axe says of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from playwright.async_api import Page

AXE = Path(__file__).resolve().parent / "node" / "node_modules" / "axe-core" / "axe.min.js"
SAMPLED = "#samples [aria-pressed=true]"
"""There once the page has taken its first sample."""
Visit: TypeAlias = Callable[..., Awaitable[Page]]


class Watched:
    """What a page has logged, and which hosts it has asked."""

    def __init__(self, page: Page, url: str, refused: bool) -> None:
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self._host = urlsplit(url).netloc
        self._refused = refused
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._ask(request.url))

    def _note(self, kind: str, text: str) -> None:
        if self._refused and text.startswith("Failed to load resource"):
            return  # the browser's own word for an answer above 399, where the test is about one
        if kind in ("error", "warning"):
            self.errors.append(text)

    def _ask(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.netloc)

    @property
    def problems(self) -> list[str]:
        """Errors that it logged, and hosts other than the gateway's that it asked."""
        return [*self.errors, *(f"asked {host}" for host in self.hosts - {self._host})]


async def serious(page: Page, within: str = "html") -> list[str]:
    """What axe finds serious or critical in the page, or in a part of it, as it is."""
    assert AXE.exists(), "no axe-core: npm --prefix tests/node ci"
    await page.evaluate(AXE.read_text("utf-8"))
    found = await page.evaluate("async (within) => (await axe.run(within)).violations", within)
    return [
        f"{each['id']}: {node['target']} {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
