"""The evaluation's pages say what its results say."""

from __future__ import annotations

import copy

import pytest

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


def test_a_verdict_turns_with_its_figure(results):
    changed = copy.deepcopy(results)
    rows = changed["evaluation"]["results"]["rows"]
    third = next(row for row in rows if (row["method"], row["budget"]) == ("hiprune", "1/3"))
    said = []
    for share in (0.949, 0.95):
        third["of_unpruned"]["value"] = share
        said.append("**met**" in evaluation_tables.verdicts(changed).splitlines()[0])
    assert said == [False, True]


def test_markers_that_do_not_pair_or_name_no_table_are_refused(results):
    with pytest.raises(ValueError, match="once each"):
        evaluation_tables.refreshed("<!-- run -->", results)
    with pytest.raises(ValueError, match="no table weather"):
        evaluation_tables.refreshed("<!-- weather -->\n<!-- /weather -->", results)
