"""The evaluation's pages say what its results say."""

from __future__ import annotations

import copy

import pytest

from hiprune.checkpoints import digest_of_all
from hiprune.config import EMBEDDED_MODEL
from hiprune.policies import METHODS
from tools import evaluation_tables


@pytest.fixture(scope="module")
def results():
    return evaluation_tables.read_results()


@pytest.mark.parametrize("page", evaluation_tables.PAGES, ids=lambda path: path.name)
def test_the_pages_hold_the_figures_of_the_last_run(page, results):
    text = page.read_text("utf-8")
    assert evaluation_tables.refreshed(text, results) == text, "make tables"


def test_all_files_are_of_one_run(results):
    settings = [content["settings"] for content in results.values()]
    assert len(settings) == 3
    assert all(each == settings[0] for each in settings)


def test_every_table_is_on_a_page():
    pages = "".join(path.read_text("utf-8") for path in evaluation_tables.PAGES)
    assert all(f"<!-- {name} -->" in pages for name in evaluation_tables.TABLES)


def test_every_method_of_the_service_is_in_the_table(results):
    methods = {row["method"] for row in results["evaluation"]["results"]["rows"]}
    assert methods == set(METHODS)


def test_the_figures_are_of_the_included_model(results):
    assert results["evaluation"]["settings"]["model_digest"] == digest_of_all(EMBEDDED_MODEL)


@pytest.mark.parametrize(
    ("share", "low", "high", "said"),
    [
        (0.949, 0.9, 0.96, "missed, not surely"),
        (0.949, 0.9, 0.9499, "missed"),
        (0.95, 0.94, 0.96, "met, not surely"),
        (0.96, 0.95, 0.97, "met"),
    ],
)
def test_a_verdict_turns_with_its_figure_and_says_how_sure_it_is(results, share, low, high, said):
    changed = copy.deepcopy(results)
    rows = changed["evaluation"]["results"]["rows"]
    third = next(row for row in rows if (row["method"], row["budget"]) == ("hiprune", "1/3"))
    third["of_unpruned"] = {"value": share, "low": low, "high": high}
    assert f"**{said}**" in evaluation_tables.verdicts(changed).splitlines()[0]


@pytest.mark.parametrize("control", ["random", "strided"])
def test_who_surely_beats_a_method_is_named_whichever_control_it_is(results, control):
    changed = copy.deepcopy(results)
    rows = changed["evaluation"]["results"]["rows"]
    row = next(row for row in rows if (row["method"], row["budget"]) == ("divprune", "1/9"))
    for sign, words in ((-1, "behind"), (1, "ahead of")):
        row[f"minus_{control}"] = {"value": 0.2 * sign, "low": 0.2 * sign - 0.1, "high": 0.2 * sign + 0.1}
        (line,) = (
            line
            for line in evaluation_tables.verdicts(changed).splitlines()
            if f"Surely {words} {control.upper()}" in line
        )
        assert f"divprune at 1/9 ({20 * sign:+.1f})" in line


def test_markers_that_do_not_pair_or_name_no_table_are_refused(results):
    with pytest.raises(ValueError, match="once each"):
        evaluation_tables.refreshed("<!-- run -->", results)
    with pytest.raises(ValueError, match="no table weather"):
        evaluation_tables.refreshed("<!-- weather -->\n<!-- /weather -->", results)
