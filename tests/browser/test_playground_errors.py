"""The playground when things go wrong or take long: in a real Chromium, before an llm of a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Page, Route

from hiprune.errors import Exhausted, InvalidInput, Unavailable
from tests.browsers import SAMPLED, Visit
from tests.gateways import KEY, ScriptedLlm, gateway, scripted_llm
from tests.stacks import picture, questions

pytestmark = pytest.mark.extra

PICTURE = {"name": "chosen.png", "mimeType": "image/png", "buffer": picture(questions()[0]["image"])}


@pytest.fixture(scope="module")
async def served() -> AsyncIterator[tuple[ScriptedLlm, str]]:
    async with scripted_llm() as scripted, gateway(scripted.address) as url:
        yield scripted, url


@pytest.fixture
def llm(served: tuple[ScriptedLlm, str]) -> ScriptedLlm:
    served[0].reset()
    return served[0]


@pytest.fixture
def url(llm: ScriptedLlm, served: tuple[ScriptedLlm, str]) -> str:
    return served[1]


async def ask(page: Page) -> None:
    await page.wait_for_selector(SAMPLED)
    await page.click("#submit")


async def drawn(page: Page) -> None:
    """Waits until what was due to be drawn is drawn."""
    await page.evaluate(
        "new Promise(done => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done))))"
    )


@pytest.mark.parametrize("how", ["button", "escape"])
async def test_an_answer_can_be_cancelled_and_the_llms_work_ends(
    visit: Visit, url: str, llm: ScriptedLlm, how: str
) -> None:
    async def pace(place: int) -> None:
        if place == 1:
            await asyncio.Event().wait()

    llm.pace = pace
    page = await visit(url)
    await ask(page)
    await page.wait_for_selector("#answer-pruned .answer:has-text('a')")
    if how == "button":
        await page.focus("#cancel")
        await page.keyboard.press("Enter")
    else:
        await page.keyboard.press("Escape")
    async with asyncio.timeout(10):
        await llm.asked[0].ended.wait()
    await page.wait_for_selector("#answer-pruned[data-state=cancelled]")
    assert "cancelled" in (await page.text_content("#answer-pruned .foot") or "")
    assert await page.text_content("#said") == "Cancelled."
    assert await page.is_disabled("#cancel")
    assert await page.evaluate("document.activeElement.id") == "submit"
    assert len(llm.asked) == 1
    llm.pace = None
    await page.click("#submit")
    await page.wait_for_selector("#answer-unpruned[data-state=done]")
    assert await page.text_content("#answer-pruned .answer") == "a red circle"


async def test_a_picture_chosen_during_an_answer_stays_and_that_answer_does_not_come_back(
    visit: Visit, url: str, llm: ScriptedLlm
) -> None:
    async def pace(place: int) -> None:
        if place == 1:
            await asyncio.Event().wait()

    llm.pace = pace
    page = await visit(url)
    await ask(page)
    await page.wait_for_selector("#answer-pruned .answer:has-text('a')")
    await page.set_input_files("#file", PICTURE)
    await page.wait_for_selector("#picture-name:has-text('chosen.png')")
    async with asyncio.timeout(10):
        await llm.asked[0].ended.wait()
    await drawn(page)
    assert await page.is_hidden("#answers")
    assert await page.is_hidden("#lists")
    assert await page.get_attribute("#canvas", "aria-label") == "The picture chosen.png"


async def test_a_sample_that_comes_late_does_not_replace_a_newer_choice(visit: Visit, url: str) -> None:
    page = await visit(url)
    await page.wait_for_selector(SAMPLED)
    go_on, gone_on = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        await go_on.wait()
        await route.continue_()
        gone_on.set()

    await page.route("**/playground/samples/*", hold)
    async with page.expect_request_finished() as late:
        await page.click("#samples button >> nth=1")
        await page.set_input_files("#file", PICTURE)
        await page.wait_for_selector("#picture-name:has-text('chosen.png')")
        go_on.set()
        await gone_on.wait()
    await (await late.value).response()
    await drawn(page)
    await drawn(page)
    assert "chosen.png" in (await page.text_content("#picture-name") or "")
    assert await page.locator("#samples [aria-pressed=true]").count() == 0


async def test_of_methods_to_compare_one_is_wanted_and_the_word_goes_when_one_is_ticked(
    visit: Visit, url: str
) -> None:
    page = await visit(url)
    await page.wait_for_selector(SAMPLED)
    await page.check("[name=mode][value=compare]", force=True)
    for method in ("hiprune", "hiprune++", "random"):
        await page.uncheck(f"[name=compared][value='{method}']", force=True)
    await page.click("#submit")
    await page.wait_for_selector("#compared-methods-error:has-text('Choose one')")
    assert await page.locator("[name=compared][aria-invalid=true]").count() == 1
    await page.check("[name=mode][value=one]", force=True)
    assert await page.locator("[name=compared][aria-invalid=true]").count() == 1  # still none is chosen
    await page.check("[name=mode][value=compare]", force=True)
    await page.check("[name=compared][value=random]", force=True)
    assert await page.is_hidden("#compared-methods-error")
    assert await page.locator("[aria-invalid]").count() == 0


async def test_an_answer_is_shown_as_it_comes(visit: Visit, url: str, llm: ScriptedLlm) -> None:
    go_on = asyncio.Event()

    async def pace(place: int) -> None:
        if place == 2:
            await go_on.wait()

    llm.pace = pace
    page = await visit(url)
    await ask(page)
    await page.wait_for_selector("#lists:not([hidden])")  # the report is there before the answer's end
    await page.wait_for_selector("#answer-pruned .answer:text-is('a red')")
    assert await page.get_attribute("#answer-pruned", "data-state") == "asking"
    go_on.set()
    await page.wait_for_selector("#answer-pruned[data-state=done]")


async def test_an_answer_is_text_whatever_it_says(visit: Visit, url: str, llm: ScriptedLlm) -> None:
    llm.words = ["<img src=x onerror=alert(1)>", "<b>bold</b>"]
    page = await visit(url)
    await ask(page)
    await page.wait_for_selector("#answer-unpruned[data-state=done]")
    assert await page.text_content("#answer-pruned .answer") == "".join(llm.words)
    assert await page.locator(".answer > *").count() == 0


async def test_of_a_spent_quota_it_is_told_when_to_come_back(
    visit: Visit, url: str, llm: ScriptedLlm
) -> None:
    llm.error = Exhausted("requests a minute are spent", reason="QUOTA", retry_after_s=2)
    page = await visit(url, refused=True)
    await ask(page)
    await page.wait_for_selector("#form-wait:has-text('Again in')")
    assert "requests a minute are spent" in (await page.text_content("#form-error") or "")
    await page.wait_for_selector("#form-wait:has-text('You may try again now')")
    assert await page.text_content("#said") == "You may try again now."
    llm.error = None
    await page.click("#submit")
    await page.wait_for_selector("#answer-unpruned[data-state=done]")
    assert await page.is_hidden("#form-error")
    assert await page.is_hidden("#form-wait")


async def test_while_it_counts_down_each_error_is_announced_once(
    visit: Visit, url: str, llm: ScriptedLlm
) -> None:
    llm.error = Exhausted("requests a minute are spent", reason="QUOTA", retry_after_s=60)
    page = await visit(url, refused=True)
    await page.evaluate(
        """() => {
          const place = document.querySelector("#form-error");
          window.announced = [];
          const note = () => place.ariaLive === "off" || announced.push(place.textContent);
          new MutationObserver(note).observe(place, {childList: true});
        }"""
    )
    await ask(page)
    await page.wait_for_selector("#form-wait:has-text('Again in 59')")
    assert await page.get_attribute("#form-wait", "aria-hidden") == "true"
    llm.error = Unavailable("the language model went away")
    await page.click("#submit")
    await page.wait_for_selector("#form-error:has-text('went away')")
    first, second = await page.evaluate("announced")
    assert "requests a minute are spent" in first
    assert "the language model went away" in second


async def test_a_comparison_ends_at_a_spent_quota(visit: Visit, url: str, llm: ScriptedLlm) -> None:
    page = await visit(url, refused=True)
    await page.wait_for_selector(SAMPLED)
    await page.check("[name=mode][value=compare]", force=True)

    async def pace(place: int) -> None:
        if len(llm.asked) == 3:
            llm.error = Exhausted("spent", reason="QUOTA", retry_after_s=60)

    llm.pace = pace
    await page.click("#submit")
    await page.wait_for_selector("#form-wait:has-text('Again in')")
    await page.wait_for_selector("#progress", state="hidden")
    assert 3 <= len(llm.asked) <= 6  # of 13
    assert await page.locator("#grid button[data-state=cancelled]").count() >= 7
    assert await page.locator("#grid button[data-state=failed]").count() >= 1


async def test_a_comparison_of_what_no_method_can_answer_ends_at_the_first(
    visit: Visit, url: str, llm: ScriptedLlm
) -> None:
    llm.error = InvalidInput("is no picture", field="messages[0].parts[0].image")
    page = await visit(url, refused=True)
    await page.wait_for_selector(SAMPLED)
    await page.check("[name=mode][value=compare]", force=True)
    await page.click("#submit")
    await page.wait_for_selector("#ask .error:has-text('is no picture')")
    await page.wait_for_selector("#progress", state="hidden")
    assert len(llm.asked) == 1  # of 13


async def test_padding_is_not_dropped_and_a_newer_services_kind_is_shown_as_it_is_named(
    visit: Visit, url: str
) -> None:
    page = await visit(url)
    await page.wait_for_selector(SAMPLED)
    await page.evaluate(
        """async () => {
          const { Stage } = await import("/playground/stage.js");
          const image = document.querySelector("#preview");
          const valid = { top: 0, left: 0, height: 2, width: 2 };
          const view = { grid_height: 2, grid_width: 3, valid, kept_indices: [0], kinds: ["77"] };
          new Stage().show({ image, name: "a.png", width: 112, height: 112 }, { views: [view] }, "");
        }"""
    )
    words = await page.locator("#legend b").all_inner_texts()
    assert words == ["1", "3"]  # kept, dropped
    assert await page.text_content("#legend .kind") == "77"
    assert await page.text_content("#lists [data-kind='77']") == "0"
    await page.focus("#canvas")
    for key, kind in (("ArrowRight", "77"), ("ArrowRight", "dropped"), ("ArrowRight", "padding")):
        await page.keyboard.press(key)
        assert f"kind {kind}" in (await page.text_content("#token-said") or "")


async def test_a_comparison_asks_two_at_a_time_and_can_be_cancelled(
    visit: Visit, url: str, llm: ScriptedLlm
) -> None:
    async def pace(place: int) -> None:
        if len(llm.asked) > 1:  # the unpruned one is the first, and alone
            await asyncio.Event().wait()

    llm.pace = pace
    page = await visit(url)
    await page.wait_for_selector(SAMPLED)
    await page.check("[name=mode][value=compare]", force=True)
    await page.click("#submit")
    async with asyncio.timeout(10):
        while len(llm.asked) < 3:  # noqa: ASYNC110  # in another process
            await asyncio.sleep(0.02)
    await page.click("#cancel")
    await page.wait_for_selector("#progress", state="hidden")
    async with asyncio.timeout(10):
        for each in llm.asked:
            await each.ended.wait()
    assert len(llm.asked) == 3  # of 13, two at a time


async def test_a_service_that_wants_keys_is_asked_with_one(visit: Visit, url: str, llm: ScriptedLlm) -> None:
    llm.key = KEY
    page = await visit(url, ready=False, refused=True)
    await page.wait_for_selector("#key-error:has-text('wants a key')")
    assert await page.is_visible("#key")
    await page.fill("#key", "wrong")
    await page.press("#key", "Tab")
    await page.wait_for_selector("#key-error:has-text('no API key')")
    await page.fill("#key", KEY)
    await page.press("#key", "Tab")
    await page.wait_for_selector("#served[data-state=ready]")
    await ask(page)
    await page.wait_for_selector("#answer-unpruned[data-state=done]")
    assert llm.asked[0].metadata["authorization"] == f"Bearer {KEY}"


async def test_an_answer_that_breaks_off_keeps_its_words_and_says_so(
    visit: Visit, url: str, llm: ScriptedLlm
) -> None:
    llm.error, llm.error_after = Unavailable("the language model went away"), 2
    page = await visit(url)
    await ask(page)
    await page.wait_for_selector("#answer-pruned[data-state=failed]")
    words = await page.text_content("#answer-pruned .answer") or ""
    assert words.startswith("a red")
    assert "the language model went away" in words
    assert "the language model went away" in (await page.text_content("#form-error") or "")


async def test_a_gateway_that_is_gone_is_said_to_be(visit: Visit, llm: ScriptedLlm) -> None:
    async with gateway(llm.address) as gone:
        page = await visit(gone, refused=True)
        await page.wait_for_selector(SAMPLED)
    await page.click("#submit")
    await page.wait_for_selector("#form-error:has-text('cannot be reached')")
    await page.context.set_offline(True)
    await page.click("#submit")
    await page.wait_for_selector("#form-error:has-text('offline')")


async def test_a_model_that_comes_late_is_found_when_it_is_asked(
    visit: Visit, url: str, llm: ScriptedLlm
) -> None:
    llm.key = KEY
    page = await visit(url, ready=False, refused=True)
    await page.wait_for_selector("#served[data-state=failed]")
    llm.key = ""
    await ask(page)
    await page.wait_for_selector("#answer-unpruned[data-state=done]")


async def test_without_samples_a_file_is_asked_about(visit: Visit, llm: ScriptedLlm) -> None:
    async with gateway(llm.address, samples="") as url:
        page = await visit(url)
        assert await page.is_hidden("#samples")
        await page.click("#submit")
        await page.wait_for_selector("#picture-error:has-text('Choose a picture')")


async def test_a_picture_above_the_bound_is_refused_before_it_is_sent(visit: Visit, llm: ScriptedLlm) -> None:
    async with gateway(llm.address, max_image_bytes=1000, samples="") as url:
        page = await visit(url)
        await page.wait_for_load_state("networkidle")
        content = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(1001)}
        await page.set_input_files("#file", content)
        await page.wait_for_selector("#picture-error:has-text('1001 bytes')")
    assert not llm.asked
