"""What the benchmarks' figures rest on: their helpers, what they write, and the judgements they pass.

No timing is asserted here, and no benchmark runs at its size.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2Config

from benchmarks import __main__ as suite
from benchmarks import (
    capture_overhead,
    checkpoints,
    encoder_load,
    latency,
    plots,
    report,
    selection_cost,
    time_to_first_token,
    tower_scaling,
)
from hiprune import tensors
from hiprune.config import EMBEDDED_MODEL
from hiprune.errors import Exhausted, Internal
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc
from tests.conftest import Serve
from tests.tiny import make_llava

FOLDER = Path(report.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
BENCHMARKS = [name for name in MODULES if name not in {"__main__", "checkpoints", "plots", "report"}]
RESULTS = sorted(report.RESULTS.glob("*.json"))
TINY_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 14,
    "fullatt_block_indexes": [1],
}


# --- measuring -------------------------------------------------------------------------------------------


def test_a_spread_is_the_median_and_the_middle_half() -> None:
    assert report.spread([5, 1, 4, 2, 3]) == {"median": 3, "p25": 1.5, "p75": 4.5, "n": 5}
    assert report.spread([7.0]) == {"median": 7.0, "p25": 7.0, "p75": 7.0, "n": 1}


def test_pairs_run_in_turn_and_swap_who_is_first() -> None:
    ran: list[str] = []

    def run(name: str) -> float:
        ran.append(name)
        return float(len(ran))

    first, second = report.pairs(lambda: run("A"), lambda: run("B"), count=4, warm_up=1)
    assert "".join(ran) == "AB" + "ABBAABBA"
    assert first == [3, 6, 7, 10]  # the warm-up is left out
    assert second == [4, 5, 8, 9]


def test_a_ratio_is_taken_pair_by_pair() -> None:
    assert report.ratios([2, 20, 300], [1, 10, 100])["median"] == 2
    with pytest.raises(ValueError):
        report.ratios([1, 2], [1])


def test_compare_gives_the_first_over_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "seconds", lambda work, device: work())
    found = report.compare(lambda: 0.003, lambda: 0.002, count=2, warm_up=0)
    assert found["ratio"]["median"] == pytest.approx(1.5)
    assert found["first_ms"]["median"] == pytest.approx(3)
    assert found["second_ms"]["median"] == pytest.approx(2)


def test_a_peak_counts_what_came_and_went_and_not_what_was_there() -> None:
    before = np.ones(48 * report.MB, dtype=np.uint8)
    with report.PeakMemory("cpu") as peak:
        passing = np.ones(32 * report.MB, dtype=np.uint8)
        del passing
    assert peak.bytes is not None
    assert 31 * report.MB < peak.bytes < 44 * report.MB
    assert before[-1] == 1


def test_a_child_is_a_process_of_its_own() -> None:
    assert report.in_child(os.getppid) == os.getpid()


def test_growth_is_linear_or_quadratic_by_its_power() -> None:
    sizes = [1024.0, 4096.0, 16384.0]
    line = report.line_fit(sizes, [3 * size for size in sizes])
    square = report.line_fit(sizes, [size * size for size in sizes])
    assert line["power"] == pytest.approx(1)
    assert line["slope"] == pytest.approx(3)
    assert line["r2"] == pytest.approx(1)
    assert square["power"] == pytest.approx(2)
    assert square["r2"] < 0.99


def test_a_matrix_product_has_a_rate() -> None:
    assert report.matmul_peak("cpu", torch.float32, side=64) > 0


# --- writing ---------------------------------------------------------------------------------------------


def test_a_target_is_met_from_its_own_side() -> None:
    assert report.target("time", 1.05, 1.05)["met"] is True
    assert report.target("time", 1.06, 1.05)["met"] is False
    assert report.target("throughput", 0.89, 0.9, least=True)["met"] is False
    assert report.target("throughput", 0.9, 0.9, least=True)["met"] is True
    assert report.target("memory", None, 0.3)["met"] is None


def test_a_result_says_when_where_and_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    target = report.target("time", 1.0, 2.0)
    path = report.write("service_tax", "a claim", {"pairs": 3}, {"ratio": 1.0}, targets=[target])
    content = json.loads(path.read_text("utf-8"))
    assert path == tmp_path / "service_tax.json"
    assert content["settings"] == {"pairs": 3}
    assert content["targets"] == [target]
    assert content["hardware"]["cores"] >= 1
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    with pytest.raises(ValueError):
        report.write("service_tax", "a claim", {}, {"ratio": float("nan")})


def test_one_device_does_not_overwrite_the_other() -> None:
    assert report.name_on("tower_scaling", "cpu") == "tower_scaling"
    assert report.name_on("tower_scaling", "cuda") == "tower_scaling_cuda"


def test_numbers_are_printed_without_powers_of_ten() -> None:
    assert [report.short(value) for value in (0.01234, 1.234, 99.94, 12345.6)] == [
        "0.0123",
        "1.23",
        "99.9",
        "12346",
    ]


def test_a_plot_is_an_svg_without_a_ground(tmp_path: Path) -> None:
    panels = [
        plots.Panel(x="tokens", y="ms", lines={"a": [(1024, 1), (4096, 9)]}, log_x=True, log_y=True),
        plots.Panel(x="ratio", bars={"b": 1.5}, limit=1.0),
    ]
    path = plots.plot("drawn", panels, folder=tmp_path)
    assert path == tmp_path / "drawn.svg"
    text = path.read_text("utf-8")
    ET.fromstring(text)
    assert "#ffffff" not in text
    assert plots.COLOURS[0] in text
    again = plots.plot("drawn", panels, folder=tmp_path)
    assert again is not None
    assert again.read_text("utf-8") == text  # no date in it, no random names


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_ink_stands_out_from_light_pages_and_from_dark_ones(ground: str) -> None:
    assert _contrast(plots.INK, ground) > 4
    for colour in plots.COLOURS:
        assert _contrast(colour, ground) > 3, colour


def _contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# --- what is in the repository ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_in_the_repository_is_whole_and_of_a_benchmark_that_exists(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    assert {"benchmark", "claim", "date", "hardware", "versions", "settings", "results"} <= set(content)
    assert content["benchmark"] == path.stem
    assert any(path.stem == name or path.stem.startswith(f"{name}_") for name in BENCHMARKS)
    assert content["claim"].strip()
    assert date.fromisoformat(content["date"]) <= date.today()
    assert {"cpu", "cores", "gpu", "torch_threads"} <= set(content["hardware"])
    assert {"python", "torch", "transformers"} <= set(content["versions"])
    assert content["results"]


def test_a_plot_in_the_repository_is_small_and_stands_beside_its_figures() -> None:
    for path in report.RESULTS.iterdir():
        assert path.suffix in {".json", ".svg", ".png"}, path
        assert path.with_suffix(".json").exists(), path
        assert path.stat().st_size <= 200_000, path


def test_the_helpers_ask_for_torch_matplotlib_and_rich_only_when_they_need_them() -> None:
    code = (
        "import sys; from benchmarks import plots, report; "
        "sys.exit(','.join({'torch', 'matplotlib', 'rich', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", MODULES)
def test_importing_a_benchmark_defines_and_does_nothing(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
            continue
        assert isinstance(
            node,
            ast.Import
            | ast.ImportFrom
            | ast.FunctionDef
            | ast.AsyncFunctionDef
            | ast.ClassDef
            # docstrings, of the module and of its constants
            | ast.Expr
            | ast.Assign
            | ast.AnnAssign,
        ), ast.unparse(node)
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)


# --- all of them, one after the other --------------------------------------------------------------------


def run_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=FOLDER.parent, env=environment, check=False
    )


def test_what_make_bench_runs_is_there_and_a_device_measures_what_knows_devices() -> None:
    on_cpu, on_cuda = suite.names("cpu"), suite.names("cuda")
    assert {name.split()[0] for name in on_cpu} <= set(BENCHMARKS)
    assert set(on_cpu) - set(on_cuda) == set(suite.WITHOUT_DEVICE)
    assert suite.names("cpu", ["soak"]) == ("soak",)
    assert suite.command("service_tax --size 0.5b", "cuda")[1:] == [
        "-m",
        "benchmarks.service_tax",
        "--size",
        "0.5b",
        "--device",
        "cuda",
    ]
    assert "--device" not in suite.command("shared_memory", "cpu")


def test_one_that_fails_keeps_no_other_from_being_measured() -> None:
    ran = run_all("selection_cost --no-such-option", "selection_cost --help")
    assert ran.returncode == 1
    assert "failed (2)" in ran.stdout
    assert "measured" in ran.stdout
    assert "2 of 2: selection_cost --help" in ran.stdout


def test_when_time_is_over_what_runs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = tmp_path / "number"
    # what a shell leaves in the background does not hear an interrupt
    script = ["sh", "-c", f"sleep 600 & echo $! > {number}; wait"]
    monkeypatch.setattr(suite, "command", lambda name, device: script)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    ended = suite.run("any", "cpu", time.monotonic() + 3)
    assert ended.outcome == "out of time"
    assert ended.seconds < 60
    arguments = Path("/proc", number.read_text("utf-8").strip(), "cmdline")
    until_s = time.monotonic() + 10
    while arguments.exists() and arguments.read_bytes():  # without any: dead, and not yet buried
        assert time.monotonic() < until_s
        time.sleep(0.01)
    assert suite.run("any", "cpu", time.monotonic()).outcome == "not begun"


# --- the benchmarks themselves, at tiny sizes ------------------------------------------------------------


def test_capture_overhead_checks_features_and_scores_before_it_times(tmp_path: Path) -> None:
    path = make_llava(tmp_path / "llava", vision_layers=24)
    found = capture_overhead.times(path, "cpu", batch=1, count=1, warm_up=0)
    assert found["features_equal_bit_by_bit"] is True
    assert set(found["scores_differ_from_eager_by"]) == {"9", "23"}
    for pair in ("time_against_no_capture", "time_against_authors"):
        assert found[pair]["ratio"]["n"] == 1


def test_capture_overhead_ends_on_scores_that_are_not_the_authors(tmp_path: Path) -> None:
    path = make_llava(tmp_path / "llava", vision_layers=24)
    ours = capture_overhead.Captured(path, "cpu", 1)
    authors = capture_overhead.Authors(path, "cpu", ours.items())
    features, scores = authors.run()
    authors.run = lambda: (features, {layer: each.flip(1) for layer, each in scores.items()})  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match="scores differ"):
        capture_overhead.check(ours, authors, torch.float32)


@pytest.mark.parametrize("way", ["captured", "plain", "window", "eager"])
def test_a_block_runs_every_way(way: str) -> None:
    found = tower_scaling.block_run(TINY_VISION, 64, way)
    assert found["seconds"] is not None
    assert found["seconds"] > 0


def test_the_towers_ratio_is_that_of_its_blocks_by_their_counts() -> None:
    assert tower_scaling.estimated_ratio(2.0, 1.0, 1.0) == pytest.approx((32 + 2) / 32)
    assert tower_scaling.estimated_ratio(1.0, 1.0, 0.1) == 1


def test_a_towers_operations_are_its_products_and_its_attention() -> None:
    """0.63 G parameters, 2 operations each a patch; and attention over the whole image in four blocks."""
    vision = checkpoints.qwen2_5_vl_3b().vision_config.to_dict()
    patches = 4 * 1024
    least = 2 * 0.63e9 * patches + 4 * 4 * patches**2 * 1280
    assert least / 1e12 < tower_scaling.tower_tflops(vision, 1024) < 1.05 * least / 1e12
    assert tower_scaling.tower_tflops(vision, 16384) == pytest.approx(172, abs=5)


def test_growth_of_memory_is_judged_by_its_power() -> None:
    def rows(power: float) -> list[dict[str, Any]]:
        return [{"merged_tokens": size, "peak_mb": {"captured": size**power}} for size in (1024, 4096, 16384)]

    assert tower_scaling.targets_of(rows(1.0))[0]["met"] is True
    assert tower_scaling.targets_of(rows(1.5))[0]["met"] is False
    assert tower_scaling.targets_of(rows(1.0)[:1])[0]["met"] is None


def test_made_up_scores_look_like_a_towers() -> None:
    scores = selection_cost.scores_of(24, seed=0)
    assert scores.shape == (576,)
    assert scores.min() > 0
    assert scores.sum() == pytest.approx(576, rel=1e-4)
    assert np.sort(scores)[-58:].sum() > 0.25 * 576  # a tenth of the tokens
    assert set(selection_cost.selection_ms(8, 2)) == {"hiprune", "hiprune_plus_plus"}


def test_positions_are_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    side = 6
    config = checkpoints.qwen2_5_vl_3b(depth=8, text_layers=0)
    config.vision_config.depth = 0
    config.text_config.layer_types = []
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    before, after = time_to_first_token.TEXT_BEFORE, time_to_first_token.TEXT_AFTER
    types = [0] * before + [1] * side**2 + [0] * after
    ids = [config.image_token_id if each else 5 for each in types]
    expected, _ = model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([types]),
        image_grid_thw=torch.tensor([[1, 2 * side, 2 * side]]),
    )
    kept = torch.tensor([0, 5, 7, 35])
    rows = torch.cat((torch.arange(before), before + kept, torch.arange(before + side**2, len(ids))))
    assert torch.equal(time_to_first_token.qwen_positions(kept, side), expected[:, 0, rows])


def test_a_random_checkpoint_goes_from_pixels_to_a_first_token(tmp_path: Path) -> None:
    vision = {**checkpoints.CLIP_B_32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    text = Qwen2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    config = checkpoints.llava({**vision, "num_attention_heads": 2}, text)
    pipeline = time_to_first_token.Pipeline(tmp_path / "llava", config, "cpu")
    found = time_to_first_token.measure(pipeline, 7, "cpu", count=1, warm_up=0)
    assert (found["visual_tokens"], found["kept"]) == (49, 15)
    assert set(found["stages_ms"]["pruned"]) == set(time_to_first_token.STAGES)
    assert found["prefill_tflops"]["pruned"] < found["prefill_tflops"]["unpruned"]


# --- the verdict on an answer ----------------------------------------------------------------------------


class Scripted(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Answers with the features of one reference and the scores of another, or fails, as told."""

    def __init__(self, offline: encoder_load.Offline) -> None:
        self._offline = offline
        self.script: list[tuple[int, int | None] | Exception] = []

    async def EncodeImage(self, request: Any, context: Any) -> encoder_service_pb2.EncodeImageResponse:
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        which, scored = step
        view = self._offline.references[which]
        scores_of = {} if scored is None else self._offline.references[scored].scores
        message = encoder_service_pb2.View(
            features=tensors.to_proto(view.features),
            attention=[
                encoder_service_pb2.LayerAttention(layer=layer, scores=tensors.to_proto(scores))
                for layer, scores in scores_of.items()
            ],
        )
        return encoder_service_pb2.EncodeImageResponse(views=[message])


async def test_an_answer_is_right_or_wrong_and_a_refusal_says_when_to_retry(serve: Serve) -> None:
    offline = encoder_load.Offline(EMBEDDED_MODEL, "cpu")
    assert offline.smallest_difference() > 10 * encoder_load.TOLERANCE["cpu"]
    servicer = Scripted(offline)
    # right; another image's features, another image's scores, and none
    answers = [(0, 0), (1, 0), (0, 1), (0, None)]
    failures = [Exhausted("full", retry_after_s=1), Exhausted("full"), Internal("broken")]
    servicer.script = [*answers, *failures]
    channel: grpc.aio.Channel = await serve(
        lambda server: encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
    )
    stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
    tally = encoder_load.Tally()
    for _ in range(7):
        await encoder_load.ask(stub, offline, 0, 0.0, tally, encoder_load.TOLERANCE["cpu"])
    assert tally.outcomes == {
        "answered": 1,
        "wrong": 3,
        "refused": 1,
        "failed: RESOURCE_EXHAUSTED": 1,
        "failed: INTERNAL": 1,
    }
    assert tally.lost() == 5


def test_a_batch_encodes_as_one_image_alone_does() -> None:
    offline = encoder_load.Offline(EMBEDDED_MODEL, "cpu")
    for view, reference in zip(offline.encode(offline.files), offline.references, strict=True):
        difference = (view.features - reference.features).abs().max() / reference.features.abs().max()
        assert float(difference) < encoder_load.TOLERANCE["cpu"]


def test_pictures_are_the_samples() -> None:
    assert isinstance(capture_overhead.picture(0), Image.Image)
    assert capture_overhead.picture(0).size == capture_overhead.picture(16).size


# --- latency ---------------------------------------------------------------------------------------------


async def test_every_budget_and_method_is_measured_from_pixels_to_the_last_token(tmp_path: Path) -> None:
    for name in ("llava", "clip"):
        shutil.copytree(EMBEDDED_MODEL.parent / name, tmp_path / name)
    pipeline = latency.Pipeline(tmp_path / "llava", tmp_path / "clip", "cpu", new_tokens=3, at_once=2)
    found = await latency.measure(pipeline, rounds=1, at_once=(1, 2))
    rows = {(row["method"], row["visual_tokens"]): row for row in found["rows"]}
    keeps = {round(share * pipeline.tokens) for share in latency.SHARES}
    assert set(rows) == {("none", pipeline.tokens), *((name, k) for name in latency.METHODS for k in keeps)}
    texts = {row["prompt_tokens"] - row["visual_tokens"] for row in found["rows"]}
    assert len(texts) == 1  # every method keeps as many as it was asked to
    for (name, _), row in rows.items():
        assert row["prefill_ms"]["median"] > 0 < row["decode_ms_per_token"]["median"]
        assert set(row["questions_per_s"]) == ({"1", "2"} if name in {"none", "hiprune"} else set())
        assert (row["prefill_tflops"] < rows["none", pipeline.tokens]["prefill_tflops"]) == (name != "none")
    vision = found["vision_ms"]
    stages = ("select_ms", "project_ms", "prefill_ms")
    for (name, _), row in rows.items():  # of one round: the tower that the method needs is on each side
        whole, part = (
            vision[tower] + sum(each[stage]["median"] for stage in stages)
            for tower, each in (
                ("without", rows["none", pipeline.tokens]),
                ({"hiprune": "with_scores", "hiprune++": "aligned"}.get(name, "without"), row),
            )
        )
        assert row["first_token_ratio"]["median"] == pytest.approx(part / whole, rel=0.02)
    assert {each["what"].split(",")[0] for each in latency.targets_of(found["rows"])} == {
        "hiprune",
        "hiprune++",
    }
