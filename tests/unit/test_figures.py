"""Every figure of README and the documents is one of a committed result, or says whose it is; and a changed
digit is noticed. What a figure is, and how it is declared, is in `tools/figures.py`."""

from __future__ import annotations

import json
import re

import pytest

from tools import figures

PAGES = figures.pages()
DECLARED = figures.declared()
LINES = [(page, line) for page, sections in DECLARED.items() for lines in sections.values() for line in lines]


def changed(text: str) -> str:
    """Another digit in its place."""
    return str((int(text) + 1) % 10)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_figure_of_a_page_is_what_it_is_declared_to_be(page: str) -> None:
    found = figures.problems(page, PAGES[page], DECLARED.get(page, {}))
    assert not found, "python tools/figures.py\n" + "\n".join(found)


def test_no_page_is_declared_that_is_not_there() -> None:
    assert set(DECLARED) <= set(PAGES)
    assert {"README.md", "docs/performance.md", "docs/scaling.md"} <= set(DECLARED)


def test_any_digit_that_changes_in_the_readmes_table_is_noticed() -> None:
    readme = PAGES["README.md"]
    start = readme.index("\n", readme.index("\n## Measured\n") + 1)
    end = readme.index("\n## ", start)
    noticed, names = 0, set()
    for digit in re.finditer(r"\d", readme[start:end]):
        place = start + digit.start()
        text = readme[:place] + changed(digit[0]) + readme[place + 1 :]
        if figures.problems("README.md", text, DECLARED["README.md"]):
            noticed += 1
        else:
            word = re.compile(r"[^\s()|\[\]]*$").search(readme[:place])
            names.add((word[0] if word else "") + re.split(r"[\s()|\[\],;]", readme[place:], maxsplit=1)[0])
    assert noticed > 70
    # the digits of names, of models and of files, are no figures
    assert names <= {
        *(
            "2026-11-22",
            "2026-11-28",
            "bf16",
            "Qwen2.5-VL-3B's",
            "CLIP-L/14-336's",
            "CLIP-L/14-336",
            "0.5B's",
            "service_tax_0_5b",
            "latency_0_5b",
        ),
        "benchmarks/results/full_size_qwen2_5_vl_3b.json",
        "benchmarks/results/service_tax_0_5b.json",
        "benchmarks/results/latency_0_5b.json",
    }


def test_a_digit_that_changes_in_a_page_and_in_what_is_declared_is_noticed() -> None:
    tried, missed = 0, []
    for page, line in LINES:
        written, equals, expression = line.partition(" = ")
        if not equals or expression.startswith("about "):  # the zeros of what is rounded further say nothing
            continue
        number = re.search(r"[\d.  ]*\d", written)
        assert number is not None
        for digit in re.finditer(r"\d", number[0]):
            place = number.start() + digit.start()
            wrong = f"{written[:place]}{changed(digit[0])}{written[place + 1 :]} = {expression}"
            tried += 1
            missed += [] if figures.why_not(wrong, PAGES[page]) else [wrong]
    assert tried > 700
    assert not missed


def test_what_is_left_out_because_a_tool_has_made_it_is_named_by_a_tool() -> None:
    names = {name for text in PAGES.values() for name in re.findall(r"<!-- /([a-z_-]+) -->", text)}
    folders = (figures.ROOT / "tools", figures.ROOT / "benchmarks")
    tools = "".join(path.read_text("utf-8") for folder in folders for path in folder.glob("*.py"))
    assert names == {name for name in names if f'"{name}"' in tools or f"<!-- /{name} -->" in tools}
    assert "settings" in names


def test_the_readme_claims_no_figure_of_somebody_elses() -> None:
    assert not [line for lines in DECLARED["README.md"].values() for line in lines if " = " not in line]


# --- what a figure is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("83.2 ms against 68.1 ms, × 1.24 (medians of 60 pairs)", ["83.2 ms", "68.1 ms", "× 1.24", "60"]),
        ("32 549 requests, 0.5 % at most, a 364th", ["32 549", "0.5 %", "364"]),
        ("0.91–1.07, within 4e-7, 20.6 times that", ["0.91", "1.07", "4e-7", "20.6 times"]),
        ("CLIP-L/14-336, Qwen2.5-VL-3B, 24-layer, 2026-11-22, 22 November 2026, vLLM 0.32, 127.0.0.1", []),
        ("decision 12, `83.2 ms`, [70 ms](x.md#10), 4 at a time, <!-- 5 ms -->", ["70 ms"]),
        ("```\n# 5 ms\n```\n<!-- made -->\n5 ms\n<!-- /made -->", []),
    ],
)
def test_a_figure_is_a_number_and_its_unit_and_no_name(text: str, expected: list[str]) -> None:
    (section,) = figures.sections(f"[a](../benchmarks/results/a.json) {text} 11.5 s")
    assert list(section.figures) == [*expected, "11.5 s"]


def test_where_nothing_measured_is_linked_to_plain_numbers_are_none() -> None:
    (section,) = figures.sections("## A\n60 pairs took 5 ms")
    assert section.figures == ("5 ms",)


# --- what does not hold ----------------------------------------------------------------------------------

TAX = json.loads((figures.RESULTS / "service_tax.json").read_text("utf-8"))["results"]
MANY_MS, ONE_MS = (TAX[name]["median"] for name in ("three_processes_ms", "one_process_ms"))
MANY, ONE = f"{MANY_MS:.1f} ms", f"{ONE_MS:.2f} ms"
PAGE = f"## A\n{MANY}, {ONE}: [x](benchmarks/results/service_tax.json)"
RIGHT = [f"{MANY} = service_tax.three_processes_ms.median", f"{ONE} = service_tax.one_process_ms.median"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (RIGHT[:1], f"behind '{MANY}' the page has '{ONE}' and figures.yaml nothing"),
        (RIGHT[::-1], f"the page has '{MANY}' and figures.yaml '{ONE}'"),
        ([*RIGHT, RIGHT[0]], f"the page has nothing and figures.yaml '{MANY}'"),
        ([RIGHT[0], f"{ONE} = service_tax.three_processes_ms.median"], f"is {MANY_MS}"),
        ([f"{MANY} = 100", RIGHT[1]], "a number is not where a number comes from"),
        ([f"{MANY} = engines.answers.alike", RIGHT[1]], "the page does not link to engines.json"),
        ([f"{MANY} = service_tax.nothing", RIGHT[1]], "KeyError"),
        ([f"{MANY} = nothing.median", RIGHT[1]], "no result is called nothing"),
        ([f'{MANY} = __import__("os").getpid()', RIGHT[1]], "is no arithmetic"),
    ],
)
def test_what_does_not_hold_is_said(lines: list[str], said: str) -> None:
    assert figures.problems("page.md", PAGE, {"A": RIGHT}) == []
    found = figures.problems("page.md", PAGE, {"A": lines})
    assert any(said in line for line in found), found


def test_a_heading_without_figures_has_none_declared() -> None:
    assert figures.problems("page.md", PAGE, {"A": RIGHT, "B": RIGHT})


@pytest.mark.parametrize(
    ("figure", "value", "about", "expected"),
    [
        ("83.2 ms", 83.249, False, True),
        ("83.2 ms", 83.251, False, False),
        ("32 549", 32549, False, True),
        ("0.0 %", 0.0186, False, True),
        ("4e-7", 3.7e-7, False, True),
        ("4e-7", 3.4e-7, False, False),
        ("170 TFLOP", 172.0, False, False),
        ("170 TFLOP", 172.0, True, True),
        ("170 TFLOP", 176.0, True, False),
    ],
)
def test_a_figure_shows_a_value_rounded_to_its_digits(
    figure: str, value: float, about: bool, expected: bool
) -> None:
    assert figures.shows(figure, value, about=about) is expected
