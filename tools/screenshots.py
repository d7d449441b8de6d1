"""Draws the playground's pictures in docs/images: `python -m tools.screenshots [FOLDER]`.

Starts the whole service on the embedded model, asks in Chromium, and takes what there is to be seen. To be
run again, with `make screenshots`, when the page or the model has changed.
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from hiprune.stack import Stack
from tools import browser as chromium

IMAGES: Final = Path(__file__).resolve().parent.parent / "docs" / "images"
SAMPLE: Final = 3
"""Which of the pictures that the page offers, from 0."""
_SIZE: Final = {"width": 1280, "height": 1020}


def main() -> None:
    """Writes playground.png, playground-dark.png and playground-compare.png."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else IMAGES
    with Stack() as stack, sync_playwright() as driver:
        url = f"http://{stack.start_gateway()}"
        started = driver.chromium.launch(executable_path=chromium.find(), args=list(chromium.FLAGS))
        page = _page(started, url, "light")
        _ask(page)
        _ask(page)  # again: its times are those of a picture that is known
        _take(page, folder / "playground.png")
        page = _page(started, url, "dark")
        _ask(page)
        page.check("[name=layer][value=object]", force=True)
        page.focus("#canvas")
        page.keyboard.press("n")
        _take(page, folder / "playground-dark.png")
        page = _page(started, url, "light")
        page.check("[name=mode][value=compare]", force=True)
        page.click("#submit")
        page.wait_for_selector("#progress", state="hidden")
        _take(page, folder / "playground-compare.png")
        started.close()


def _page(started: Browser, url: str, scheme: str) -> Page:
    """The page, as a reader of that colour scheme sees it, with a sample taken."""
    context = started.new_context(
        viewport=_SIZE,  # type: ignore[arg-type]  # playwright's own dictionary
        color_scheme=scheme,  # type: ignore[arg-type]  # light or dark
        reduced_motion="reduce",
        device_scale_factor=1.25,
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#served[data-state=ready]")
    page.wait_for_selector("#samples [aria-pressed=true]")
    page.locator("#samples button").nth(SAMPLE).click()
    page.wait_for_selector(f"#samples button:nth-child({SAMPLE + 1})[aria-pressed=true]")
    return page


def _take(page: Page, path: Path) -> None:
    """From the page's top, and without the bytes that a browser in a hurry leaves in."""
    page.evaluate("scrollTo(0, 0)")
    with Image.open(BytesIO(page.screenshot())) as taken:
        taken.convert("RGB").save(path, optimize=True)


def _ask(page: Page) -> None:
    page.click("#submit")
    page.wait_for_selector("#answer-unpruned[data-state=done]")


if __name__ == "__main__":
    main()
