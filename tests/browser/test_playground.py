"""The playground in a real Chromium, before the real services on the embedded model."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image
from playwright.async_api import Page

from tests.browsers import SAMPLED, Visit, serious
from tests.stacks import picture, questions

pytestmark = pytest.mark.extra

SAMPLE = questions()[0]
DONE = "#answer-{}[data-state=done]"


async def ask(page: Page, *, unpruned: bool = True) -> None:
    """Presses Ask and waits for the answers."""
    await page.click("#submit")
    await page.wait_for_selector(DONE.format("unpruned" if unpruned else "pruned"))


async def choose(page: Page, name: str, value: str) -> None:
    """A radio or a box behind its label."""
    await page.check(f'[name="{name}"][value="{value}"]', force=True)


async def report(address: str, **pruning: Any) -> dict[str, Any]:
    """What the API says of the first sample and its first question: the image's report."""
    data = base64.b64encode(picture(SAMPLE["image"])).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": SAMPLE["question"]},
    ]
    body = {
        "model": "llava",
        "messages": [{"role": "user", "content": parts}],
        "pruning": {"method": "hiprune++", "scores": True, **pruning},
    }
    async with httpx2.AsyncClient(trust_env=False) as http:
        answer = await http.post(f"{address}/v1/chat/completions", json=body)
    told: dict[str, Any] = answer.json()
    return {**told["pruning"]["images"][0], "answer": told["choices"][0]["message"]["content"]}


def by_kind(view: dict[str, Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, kind in zip(view["kept_indices"], view["kinds"], strict=True):
        found.setdefault(kind, []).append(index)
    return found


async def listed(page: Page) -> dict[str, list[int]]:
    """The kept tokens that the page lists, by kind."""
    lists = await page.eval_on_selector_all(
        "#lists dd", "all => all.map(each => [each.dataset.kind, each.textContent])"
    )
    return {kind: [int(index) for index in text.split()] for kind, text in lists}


async def middles(page: Page, rows: int, columns: int) -> list[list[int]]:
    """The colour in the middle of each token as it is drawn, in row-major order."""
    found: list[list[int]] = await page.evaluate(
        """([rows, columns]) => {
          const canvas = document.querySelector("#overlay");
          const copy = new OffscreenCanvas(canvas.width, canvas.height);
          const pen = copy.getContext("2d", {willReadFrequently: true});
          pen.drawImage(canvas, 0, 0);
          return Array.from({length: rows * columns}, (_, at) => {
            const x = (at % columns + 0.6) * canvas.width / columns;
            const y = (Math.floor(at / columns) + 0.6) * canvas.height / rows;
            return [...pen.getImageData(Math.floor(x), Math.floor(y), 1, 1).data];
          });
        }""",
        [rows, columns],
    )
    return found


async def focused(page: Page) -> str:
    """The id of what has the focus, or what it says."""
    found: str = await page.evaluate("document.activeElement.id || document.activeElement.value || ''")
    return found


async def test_from_load_to_answer_by_keyboard_alone(visit: Visit, address: str) -> None:
    page = await visit(address)
    await page.wait_for_selector(SAMPLED)
    for _ in range(40):
        await page.keyboard.press("Tab")
        if await focused(page) == "question":
            break
    await page.keyboard.press("ControlOrMeta+a")
    await page.keyboard.type(SAMPLE["question"])
    for _ in range(40):
        await page.keyboard.press("Tab")
        if await focused(page) == "hiprune++":
            break
    await page.keyboard.press("ArrowLeft")
    assert await page.is_checked("[name=method][value=hiprune]")
    for _ in range(40):
        await page.keyboard.press("Tab")
        if await focused(page) == "submit":
            break
    await page.keyboard.press("Enter")
    await page.wait_for_selector(DONE.format("unpruned"))
    expected = await report(address, method="hiprune")
    assert await page.text_content("#answer-pruned .answer") == expected["answer"]
    assert "Unpruned: " in (await page.text_content("#said") or "")
    for _ in range(60):
        await page.keyboard.press("Tab")
        if await focused(page) == "canvas":
            break
    await page.keyboard.press("ArrowRight")  # first, the first kept token
    said = await page.text_content("#token-said") or ""
    assert f"token {expected['views'][0]['kept_indices'][0]}," in said


async def test_kept_tokens_are_the_reports_and_alone_are_not_dimmed(visit: Visit, address: str) -> None:
    page = await visit(address)
    await ask(page)
    (view,) = (await report(address))["views"]
    rows, columns = view["grid_height"], view["grid_width"]
    assert await listed(page) == by_kind(view)
    drawn = await middles(page, rows, columns)
    await choose(page, "layer", "image")
    plain = await middles(page, rows, columns)
    assert [at for at in range(rows * columns) if drawn[at] == plain[at]] == view["kept_indices"]
    legend = await page.eval_on_selector_all(
        "#legend label",
        "all => all.map(each => ['.kind', 'b'].map(part => each.querySelector(part).textContent))",
    )
    assert {kind: int(count) for kind, count in legend} == {
        kind: len(indices) for kind, indices in by_kind(view).items()
    }
    await choose(page, "layer", "kept")
    await page.uncheck("#legend [value=register]")
    without = await middles(page, rows, columns)
    changed = [at for at, colour in enumerate(drawn) if colour != without[at]]
    assert changed == by_kind(view)["register"]


async def test_another_method_shows_other_tokens_beside_the_same_unpruned_answer(
    visit: Visit, address: str
) -> None:
    page = await visit(address)
    await ask(page)
    drawn = await page.evaluate("document.querySelector('#overlay').toDataURL()")
    unpruned = await page.text_content("#answer-unpruned .answer")
    assert unpruned == (await report(address, method="none"))["answer"]
    seen = set()
    for method in ("hiprune", "random", "strided"):
        await choose(page, "method", method)
        await ask(page)
        (view,) = (await report(address, method=method))["views"]
        assert await listed(page) == by_kind(view)
        seen.add(await page.evaluate("document.querySelector('#overlay').toDataURL()"))
        assert await page.text_content("#answer-unpruned .answer") == unpruned
    assert len(seen | {drawn}) == 4
    assert await page.locator("#layers label").count() == 2  # strided looks at no scores
    await choose(page, "method", "none")
    await ask(page, unpruned=False)
    assert await page.is_hidden("#answer-unpruned")
    assert await page.is_disabled("#keep")


async def test_what_was_asked_for_is_what_the_report_says_was_asked_for(visit: Visit, address: str) -> None:
    page = await visit(address)
    for keep, count in (("50", 50), ("25%", None)):
        await page.fill("#keep", keep)
        await ask(page)
        image = await report(address, keep=keep)
        assert count in (None, image["tokens_kept"])
        note = await page.text_content("#kept-note") or ""
        assert f"{image['tokens_kept']} of {image['tokens_before']} tokens" in note
    await page.locator("#keep-slider").press("ArrowRight")
    assert await page.input_value("#keep") == "26%"
    await page.fill("#keep", "2/3")
    assert await page.input_value("#keep-slider") == "67"


async def test_figures_are_those_of_both_answers(visit: Visit, address: str) -> None:
    page = await visit(address)
    await ask(page)
    rows = await page.eval_on_selector_all(
        "#figures tbody tr:not(.group)",
        "all => all.map(row => [...row.cells].map(cell => cell.textContent))",
    )
    rows = {title: cells for title, *cells in rows}
    image = await report(address)
    before, kept = image["tokens_before"], image["tokens_kept"]
    assert rows["visual tokens"] == [str(kept), str(before), f"× {kept / before:.2f}"]
    assert float(rows["prefill, in FLOPs"][2].removeprefix("× ")) < 0.6
    assert rows["cache"][0] in ("miss", "encoded hit", "pruned hit")
    assert {"prune", "prefill", "decode", "first word", "all of it"} <= set(rows)


async def test_pointing_at_a_token_and_arrow_keys_tell_its_place_kind_and_scores(
    visit: Visit, address: str
) -> None:
    page = await visit(address)
    await ask(page)
    (view,) = (await report(address))["views"]
    rows, columns = view["grid_height"], view["grid_width"]
    index = (rows // 2) * columns + columns // 2
    box = await page.locator("#overlay").bounding_box()
    assert box is not None
    x = box["x"] + box["width"] * (columns // 2 + 0.5) / columns
    y = box["y"] + box["height"] * (rows // 2 + 0.5) / rows
    await page.mouse.move(x, y)
    words = await page.inner_text("#token")
    kinds = dict(zip(view["kept_indices"], view["kinds"], strict=True))
    assert str(index) in words
    assert f"{rows // 2 + 1}, {columns // 2 + 1}" in words
    assert kinds.get(index, "dropped") in words
    await page.mouse.move(0, 0)
    await page.focus("#canvas")
    await page.keyboard.press("n")
    await page.keyboard.press("n")
    second = view["kept_indices"][1]
    said = await page.text_content("#token-said") or ""
    rank = 1 + sum(score > view["scores"]["object"][second] for score in view["scores"]["object"])
    assert f"token {second}," in said
    assert f"kind {kinds[second]}" in said
    assert f"rank {rank}" in said
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("End")
    said = await page.text_content("#token-said") or ""
    row = second // columns + 1
    assert f"row, column {row + 1}, {columns}" in said


async def test_heat_maps_are_drawn_of_each_layer(visit: Visit, address: str) -> None:
    page = await visit(address)
    await ask(page)
    policy = (await report(address))["policy"]
    titles = await page.locator("#layers .title").all_inner_texts()
    assert f"Object layer {policy['object_layer']}" in titles
    assert f"Deep layer {policy['deep_layer']}" in titles
    drawn = set()
    for layer in ("kept", "object", "deep", "similarity"):
        await choose(page, "layer", layer)
        drawn.add(await page.evaluate("document.querySelector('#overlay').toDataURL()"))
        assert await page.is_visible("#scale") is (layer != "kept")
    assert len(drawn) == 4


def wide_png() -> bytes:
    """300 by 100: black, red in the middle, black."""
    image = Image.new("RGB", (300, 100), "black")
    image.paste("red", (100, 0, 200, 100))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


async def test_a_file_is_chosen_and_the_part_that_the_encoder_sees_is_shown(
    visit: Visit, address: str
) -> None:
    page = await visit(address)
    await page.wait_for_selector(SAMPLED)
    async with page.expect_file_chooser() as chooser:
        await page.click("#file")
    await (await chooser.value).set_files({"name": "wide.png", "mimeType": "image/png", "buffer": wide_png()})
    await page.wait_for_selector("#picture-name:has-text('wide.png')")
    await page.fill("#question", "how many shapes are in the image ?")
    await choose(page, "method", "none")
    await ask(page, unpruned=False)
    await choose(page, "layer", "image")
    colours = await middles(page, 3, 3)  # of the square in the middle, which is red
    assert all(red > 200 and green < 60 for red, green, *_ in colours)


async def test_a_file_is_dropped_or_pasted(visit: Visit, address: str) -> None:
    page = await visit(address)
    await page.wait_for_selector(SAMPLED)
    data = base64.b64encode(wide_png()).decode()
    for event, name in (("drop", "dropped.png"), ("paste", "pasted.png")):
        await page.evaluate(
            """([event, name, data]) => {
              const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
              const files = new DataTransfer();
              files.items.add(new File([bytes], name, {type: "image/png"}));
              const made = event === "drop"
                ? new DragEvent(event, {dataTransfer: files, bubbles: true, cancelable: true})
                : new ClipboardEvent(event, {clipboardData: files, bubbles: true, cancelable: true});
              document.querySelector("#drop").dispatchEvent(made);
            }""",
            [event, name, data],
        )
        await page.wait_for_selector(f"#picture-name:has-text('{name}')")
    await ask(page)
    assert await page.text_content("#answer-pruned .answer")


async def test_what_is_refused_is_said_beside_its_field(visit: Visit, address: str) -> None:
    page = await visit(address, refused=True)
    await page.wait_for_selector(SAMPLED)
    for field, value, says in (
        ("keep", "1.5", "pruning.keep"),
        ("keep", "", "how much to keep"),
        ("question", " ", "Write a question"),
        ("question", "a </s> b", "messages[0].content[1].text"),
        ("alpha", "2", "pruning.alpha"),
        ("object_layer", "99", "pruning.object_layer"),
        ("max_completion_tokens", "0", "max_completion_tokens"),
    ):
        await page.evaluate("document.querySelector('#more').open = true")
        right = await page.input_value(f"#{field}")
        await page.fill(f"#{field}", value)
        await page.evaluate("document.querySelector('#more').open = false")
        await page.click("#submit")
        await page.wait_for_selector(f"#{field}-error")
        assert says in (await page.text_content(f"#{field}-error") or "")
        assert await focused(page) == field
        assert await page.get_attribute(f"#{field}", "aria-invalid") == "true"
        assert await page.locator("#ask .error:visible").count() == 1
        await page.fill(f"#{field}", right)
        assert await page.is_hidden(f"#{field}-error")


async def test_a_file_that_is_no_picture_is_refused_before_it_is_sent(visit: Visit, address: str) -> None:
    page = await visit(address)
    await page.wait_for_selector(SAMPLED)
    for name, kind, says in (("notes.txt", "text/plain", "text/plain"), ("a.png", "image/png", "no picture")):
        await page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": b"words"})
        await page.wait_for_selector(f"#picture-error:has-text('{says}')")


async def test_a_picture_that_the_encoder_refuses_is_refused_beside_it(visit: Visit, address: str) -> None:
    page = await visit(address, refused=True)
    await page.wait_for_selector(SAMPLED)
    thin = BytesIO()
    Image.new("RGB", (1, 300), "red").save(thin, "PNG")
    file = {"name": "thin.png", "mimeType": "image/png", "buffer": thin.getvalue()}
    await page.set_input_files("#file", file)
    await page.wait_for_selector("#picture-name:has-text('thin.png')")
    await page.click("#submit")
    await page.wait_for_selector("#picture-error:has-text('image_url.url')")
    assert await focused(page) == "file"
    assert await page.is_hidden("#answers")


async def test_methods_and_retentions_are_compared_in_a_grid_of_which_each_opens(
    visit: Visit, address: str
) -> None:
    page = await visit(address)
    await choose(page, "mode", "compare")
    await page.fill("#keeps", "1/4, 50")
    await page.click("#submit")
    await page.wait_for_selector("#compare-note:has-text('7 of 7 answers')")
    await page.wait_for_selector("#progress", state="hidden")
    assert await page.locator("#grid thead th").all_inner_texts() == ["keep 1/4", "keep 50"]
    assert await page.locator("#grid tbody th").all_inner_texts() == [
        "unpruned",
        "hiprune",
        "hiprune++",
        "random",
    ]
    unpruned = (await report(address, method="none"))["answer"]
    cells = page.locator("#grid tbody tr:not(.reference) button")
    place = 0
    for method in ("hiprune", "hiprune++", "random"):
        for keep in ("1/4", "50"):
            image = await report(address, method=method, keep=keep)
            words = await cells.nth(place).inner_text()
            assert image["answer"] in words
            assert f"{image['tokens_kept']} tokens" in words
            assert ("= as unpruned" in words) is (image["answer"].strip() == unpruned.strip())
            place += 1
    await cells.nth(5).focus()
    await page.keyboard.press("Enter")
    assert await listed(page) == by_kind((await report(address, method="random", keep="50"))["views"][0])
    assert await page.text_content("#answer-unpruned .answer") == unpruned
    assert await page.get_attribute("#grid button >> nth=6", "aria-pressed") == "true"
    assert not await serious(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(visit: Visit, address: str, scheme: str) -> None:
    page = await visit(address, color_scheme=scheme, refused=True)
    await page.wait_for_selector(SAMPLED)
    await page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    await page.fill("#keep", "x")
    await page.click("#submit")
    await page.wait_for_selector("#keep-error")
    assert not await serious(page)
    await page.fill("#keep", "1/3")
    await ask(page)
    assert not await serious(page, "#results")
    await choose(page, "layer", "deep")
    assert not await serious(page, "#kept")


@pytest.mark.parametrize("width", [320, 640])  # a phone; and 1280 at 200 %
async def test_a_narrow_window_needs_no_scrolling_sideways(visit: Visit, address: str, width: int) -> None:
    page = await visit(address, viewport={"width": width, "height": 700})
    await ask(page)
    await page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert await page.evaluate("document.documentElement.scrollWidth") == width
    await choose(page, "mode", "compare")
    await page.fill("#keeps", "1/3")
    await page.click("#submit")
    await page.wait_for_selector("#compare-note:has-text('4 of 4 answers')")
    assert await page.evaluate("document.documentElement.scrollWidth") == width


async def test_a_key_is_kept_nowhere_but_in_the_page(visit: Visit, address: str) -> None:
    page = await visit(address)
    await page.evaluate("document.querySelector('#more').open = true")
    await page.fill("#key", "canarykey")
    async with page.expect_request("**/v1/chat/completions") as sent:
        await ask(page)
    assert (await sent.value).headers["authorization"] == "Bearer canarykey"
    kept = await page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    assert "canary" not in kept
    await page.reload()
    assert await page.input_value("#key") == ""


async def test_what_each_view_sees_of_the_picture(visit: Visit, address: str) -> None:
    page = await visit(address)
    found = await page.evaluate(
        """async () => {
          const { sourceOf } = await import("/playground/picture.js");
          const picture = { width: 80, height: 30 };
          const grid = { grid_height: 4, grid_width: 4 };
          const tile = (valid) => ({ ...grid, valid });
          // two tiles of 4 by 4 tokens side by side; the picture fills 8 by 3, the first row is padding
          const valid = { top: 1, left: 0, height: 3, width: 4 };
          const layout = { tile_rows: 1, tile_columns: 2 };
          const tiled = { layout, views: [grid, tile(valid), tile(valid)] };
          return [
            sourceOf(picture, { views: [grid] }, 0),
            sourceOf(picture, { views: [{ grid_height: 2, grid_width: 8 }] }, 0),
            ...[0, 1, 2].map((number) => sourceOf(picture, tiled, number)),
          ];
        }"""
    )
    assert [[each[name] for name in ("x", "y", "width", "height")] for each in found] == [
        [25, 0, 30, 30],
        [0, 5, 80, 20],
        [0, 0, 80, 30],
        [0, -10, 40, 40],
        [40, -10, 40, 40],
    ]
