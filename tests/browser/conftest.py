"""Fixtures: a real Chromium, pages in it that are watched, and the real stack's gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

from hiprune.stack import Stack
from tests.browsers import Visit, Watched
from tools import browser as chromium


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium. That there is none is a failure and no skip."""
    async with async_playwright() as driver:
        started = await driver.chromium.launch(
            executable_path=chromium.find(), headless=True, args=list(chromium.FLAGS)
        )
        yield started
        await started.close()


@pytest.fixture
async def visit(browser: Browser) -> AsyncIterator[Visit]:
    """Opens a page of its own: `page = await visit(url, color_scheme="dark", refused=True)`.

    At the test's end no page may have logged an error or asked another host. `refused`: it will be answered
    with errors by the gateway, which the browser logs by itself.
    """
    watched: list[Watched] = []
    async with AsyncExitStack() as ends:

        async def open_page(url: str, *, ready: bool = True, refused: bool = False, **options: Any) -> Page:
            # reduced motion: nothing to wait for
            made = await browser.new_context(
                **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
            )
            ends.push_async_callback(made.close)
            page = await made.new_page()
            page.set_default_timeout(30_000)
            watched.append(Watched(page, url, refused))
            await page.goto(url)
            if ready:
                await page.wait_for_selector("#served[data-state=ready]")
            return page

        yield open_page
    assert [problem for each in watched for problem in each.problems] == []


@pytest.fixture(scope="module")
async def address(stack: Stack) -> AsyncIterator[str]:
    """The URL of the real stack's gateway."""
    yield f"http://{stack.start_gateway()}"
    stack.end("gateway")
