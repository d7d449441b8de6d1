"""The playground as it is served: what is there, what may run and load, and what the operator may change."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from hiprune.config import ConfigError
from services.gateway import pages
from services.gateway.pages import Playground
from services.gateway.settings import Settings
from tests.gateways import gateway
from tests.stacks import SAMPLES, questions

FOLDER = Path(pages.__file__).parent / "playground"
LLM = "127.0.0.1:1"  # the page needs none


@pytest.fixture(scope="module")
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with gateway(LLM) as url, httpx2.AsyncClient(base_url=url) as client:
        yield client


async def test_the_page_comes_with_all_that_it_names(http):
    seen, todo = set(), ["/"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = await http.get(path)
        assert answer.status_code == 200, path
        todo += re.findall(r'(?:src|href)="(/[^"]*)"', answer.text)
        todo += [f"/playground/{name}" for name in re.findall(r'from "\./([^"]+)"', answer.text)]
    served = {f"/playground/{path.name}" for path in FOLDER.iterdir() if path.name != "index.html"}
    assert seen == {"/", *served}


async def test_the_page_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000


@pytest.mark.parametrize("path", ["/", "/playground/main.js", "/playground/setup.json"])
async def test_the_page_may_run_and_load_what_comes_from_here_alone(http, path):
    headers = (await http.get(path)).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"


async def test_no_script_or_style_stands_in_the_page_itself(http):
    page = (await http.get("/")).text
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=|javascript:", page)
    assert not re.findall(r"https?://", page)


async def test_what_a_browser_has_is_not_sent_again(http):
    first = await http.get("/playground/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = await http.get(
        "/playground/main.js", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'}
    )
    assert (again.status_code, again.content) == (304, b"")
    other = await http.get("/playground/style.css", headers={"if-none-match": first.headers["etag"]})
    assert other.status_code == 200


async def test_head_tells_what_get_would(http):
    got, told = await http.get("/"), await http.head("/")
    assert (told.status_code, told.content) == (200, b"")
    assert told.headers["content-length"] == got.headers["content-length"]
    assert told.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/index.html",
        "/playground/../settings.py",
        "/playground/samples/questions.json",
    ],
)
async def test_what_is_not_among_the_files_is_not_there(http, path):
    assert (await http.get(path)).status_code == 404


async def test_the_samples_are_offered_with_their_questions(http):
    setup = (await http.get("/playground/setup.json")).json()
    assert setup["max_image_bytes"] == Settings().max_image_bytes
    assert 0 < len(setup["samples"]) <= pages.MAX_SAMPLES
    first = setup["samples"][0]
    asked = [each["question"] for each in questions() if each["image"] == f"{first['name']}.png"]
    assert first["questions"] == asked
    picture = await http.get(first["url"])
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == (SAMPLES / f"{first['name']}.png").read_bytes()


async def test_a_gateway_without_samples_serves_the_page_all_the_same():
    async with gateway(LLM, samples="") as url, httpx2.AsyncClient(base_url=url) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/playground/setup.json")).json()["samples"] == []


async def test_the_playground_can_be_switched_off():
    assert Settings.read(["--no-playground"], {}).playground is False
    async with gateway(LLM, playground=False) as url, httpx2.AsyncClient(base_url=url) as client:
        for path in ("/", "/playground/main.js", "/playground/setup.json"):
            answer = await client.get(path)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "not_found"


async def test_a_sample_is_there_at_its_address_whatever_its_name(tmp_path):
    name = "a#1 é?.png"
    (tmp_path / name).write_bytes(b"a")
    (tmp_path / "questions.json").write_text(json.dumps([{"image": name, "question": "one ?"}]))
    async with gateway(LLM, samples=str(tmp_path)) as url, httpx2.AsyncClient(base_url=url) as client:
        (offered,) = (await client.get("/playground/setup.json")).json()["samples"]
        assert offered["name"] == "a#1 é?"
        assert (await client.get(offered["url"])).content == b"a"


def test_an_operators_samples_are_offered_in_the_order_of_the_file(tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"b")
    (tmp_path / "a.webp").write_bytes(b"a")
    lines = [{"image": "b.jpg", "question": "one ?"}, {"image": "a.webp", "question": "two ?"}]
    (tmp_path / "questions.json").write_text(json.dumps([*lines, {"image": "b.jpg", "question": "three ?"}]))
    files = Playground(Settings(samples=str(tmp_path))).files
    offered = json.loads(files["/playground/setup.json"].content)["samples"]
    assert [(each["name"], each["questions"]) for each in offered] == [
        ("b", ["one ?", "three ?"]),
        ("a", ["two ?"]),
    ]
    assert files["/playground/samples/a.webp"].media_type == "image/webp"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "questions.json"),
        ("{}", "a list of"),
        ('[{"image": "gone.png", "question": "?"}]', "gone.png"),
        ('[{"image": "../a.png", "question": "?"}]', "'../a.png'"),
        ('[{"image": "a.svg", "question": "?"}]', "'a.svg'"),
        ('[{"image": "large.png", "question": "?"}]', "bytes a picture"),
    ],
)
def test_a_folder_of_samples_that_is_none_is_said_at_the_start(tmp_path, content, says):
    (tmp_path / "large.png").write_bytes(bytes(pages.MAX_SAMPLE_BYTES + 1))
    if content is not None:
        (tmp_path / "questions.json").write_text(content)
    with pytest.raises(ConfigError, match=r"samples \(--samples, HIPRUNE_GATEWAY_SAMPLES\)") as refused:
        Playground(Settings(samples=str(tmp_path)))
    assert says in str(refused.value)
