"""The commands against the real services: what they print, write and draw."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from hiprune import load, policy, sampling
from hiprune.cli import app
from hiprune.stack import Stack
from tests.stacks import SAMPLES, questions

SAMPLE = questions()[0]
PICTURE = str(SAMPLES / SAMPLE["image"])
OTHER = str(SAMPLES / questions()[-1]["image"])


@pytest.fixture
def run(stack: Stack, tmp_path: Path, monkeypatch):
    """Runs a command in an empty folder; the services are where the environment says."""
    monkeypatch.chdir(tmp_path)
    environ = {
        "HIPRUNE_ADDRESS": stack.address,
        "HIPRUNE_PRUNER_ADDRESS": stack.pruner_address,
        "HIPRUNE_ENCODER_ADDRESS": stack.encoder_address,
    }

    def run(*arguments: str, code: int = 0):
        said = CliRunner().invoke(app, list(arguments), env=environ)
        assert said.exit_code == code, said.output
        return said

    return run


def test_ask_answers_in_words_or_as_json(run):
    words = run("ask", PICTURE, SAMPLE["question"], "--method", "hiprune++", "--overlay", "kept.png")
    content = json.loads(run("ask", PICTURE, SAMPLE["question"], "--method", "hiprune++", "--json").stdout)
    assert set(content) == {"answer", "report", "completion", "first_text_s", "total_s"}
    assert words.stdout.strip() == content["answer"].strip()
    (report,) = content["report"]["media"]
    kept, before = (report["summary"][name] for name in ("tokensKept", "tokensBefore"))
    assert f"{before} → {kept} visual tokens" in " ".join(words.stderr.split())
    assert 0 < content["first_text_s"] <= content["total_s"]
    with Image.open("kept.png") as drawn:
        assert min(drawn.size) > 300


def test_prune_draws_each_image_and_writes_what_was_kept(run):
    said = run("prune", PICTURE, OTHER, "--keep", "1/4", "--out", "kept")
    assert said.stdout.count("tokens") == 2
    for image in (Path(PICTURE), Path(OTHER)):
        content = json.loads(Path("kept", f"{image.stem}.kept.json").read_text("utf-8"))
        view = content["views"][0]
        count = view["grid_height"] * view["grid_width"]
        assert content["tokens_before"] == count
        assert content["tokens_kept"] == round(count / 4) == len(view["kept_indices"]) == len(view["kinds"])
        with Image.open(content["overlay"]) as drawn:
            assert drawn.width % view["grid_width"] == 0


def test_prune_as_json_prints_one_object_and_names_the_files_it_was_told(run, tmp_path):
    said = run(
        *("prune", PICTURE, "--method", "hiprune++", "--question", SAMPLE["question"], "--json"),
        *("--overlay", "a.png", "--report", "b.json"),
    )
    (entry,) = json.loads(said.stdout)["images"]
    assert entry == json.loads(Path("b.json").read_text("utf-8"))
    assert entry["method"] == "hiprune++"
    assert "text" in entry["views"][0]["kinds"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.json"]


def test_prune_without_a_question_says_why_no_token_was_chosen_by_one(run):
    assert "no question" in run("prune", PICTURE, "--method", "hiprune++").stderr


def test_compare_draws_a_sheet_and_says_which_answers_are_those_of_all_tokens(run):
    ways = ("--methods", "hiprune,random", "--keeps", "1/2,8")
    plain = json.loads(run("compare", PICTURE, *ways, "--json").stdout)
    asked = json.loads(
        run(
            "compare", PICTURE, *ways, "--question", SAMPLE["question"], "--out", "asked.png", "--json"
        ).stdout
    )
    assert set(plain) == {"image", "question", "sheet", "whole", "cells"}
    assert [(cell["method"], cell["keep"]) for cell in plain["cells"]] == [
        (method, keep) for method in ("hiprune", "random") for keep in ("1/2", "8")
    ]
    assert asked["whole"]["tokens_kept"] == asked["whole"]["tokens_before"]
    for bare, cell in zip(plain["cells"], asked["cells"], strict=True):
        assert cell["views"] == bare["views"]
        assert cell["agrees"] is (cell["answer"].strip() == asked["whole"]["answer"].strip())
        assert "answer" not in bare
    with Image.open("compare.png") as one, Image.open("asked.png") as other:
        assert one.width == other.width
        assert one.height < other.height
    assert "so do" in run("compare", PICTURE, *ways, "--question", SAMPLE["question"]).stdout


def test_bench_measures_both_methods_in_turns_and_gives_their_ratio(run):
    load = ("bench", PICTURE, OTHER, "--question", SAMPLE["question"], "--requests", "4")
    content = json.loads(run(*load, "--against", "none", "--concurrency", "2", "--json").stdout)
    assert set(content["policies"]) == {"hiprune 1/3", "none"}
    for figures in content["policies"].values():
        assert (figures["answers"], figures["errors"]) == (4, {})
        assert (
            figures["first_text_ms"]["p50"] <= figures["first_text_ms"]["p95"] <= figures["total_ms"]["p99"]
        )
    pruned, whole = content["policies"].values()
    assert pruned["tokens_before"] == whole["tokens_before"] == whole["tokens_kept"] > pruned["tokens_kept"]
    assert content["ratio"]["total"] > 0
    assert content["answers_per_s"] > 0
    fresh = json.loads(run(*load, "--fresh", "--json").stdout)
    assert fresh["policies"]["hiprune 1/3"]["cache"] == {"miss": 4}
    assert "ratio" not in fresh
    table = run(*load, "--against", "none").stdout
    assert all(word in table for word in ("first text, p95", "cache", "against none, medians"))


def test_bench_counts_what_is_refused_by_reason_and_ends_with_1_where_nothing_was_answered(run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    said = run("bench", str(broken), "--question", "?", "--requests", "3", "--json", code=1)
    figures = json.loads(said.stdout)["policies"]["hiprune 1/3"]
    assert figures["errors"] == {"IMAGE_UNREADABLE": 3}
    assert figures["total_ms"] == {}


def test_bench_stops_when_its_time_is_up(run):
    content = json.loads(run("bench", PICTURE, "--question", "?", "--seconds", "0.5", "--json").stdout)
    assert 0.4 < content["seconds"] < 30


async def test_a_load_that_is_cancelled_gives_what_it_has(client):
    enough = asyncio.Event()
    plan = load.Plan(
        question=SAMPLE["question"],
        images=[Path(PICTURE).read_bytes()],  # noqa: ASYNC240
        policies={"hiprune": policy("hiprune")},
        sampling=sampling(max_tokens=2),
        concurrency=2,
        requests=None,
    )
    running = asyncio.create_task(load.run_load(client, plan, enough.set))
    async with asyncio.timeout(60):
        await enough.wait()
        running.cancel()
        result = await running
    assert result.content()["policies"]["hiprune"]["answers"] >= 1


def test_the_doctor_finds_the_services_well_and_of_one_model(run):
    content = json.loads(run("doctor", "--json").stdout)
    found = {each["check"]: each for each in content["findings"]}
    for service in ("llm", "pruner", "encoder", "fingerprints"):
        assert found[service]["status"] == "ok", found[service]
    assert all(name in found["fingerprints"]["message"] for name in ("llm", "pruner", "encoder"))
    words = run("doctor").stdout
    assert "0 problems" in words
