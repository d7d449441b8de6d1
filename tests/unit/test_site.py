"""The documents as a site: built strictly, it shows what the repository's host does and asks no other."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from hiprune import errors
from hiprune.telemetry import names
from tools import api_reference, http_reference
from tools.docs_site import Site, rewritten, with_blocks_apart

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ERRORS = (DOCS / "reference" / "errors.md").read_text("utf-8")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    # the theme's authors tell of their next product
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HIPRUNE_REPOSITORY": ""}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "WARNING" not in ran.stdout + ran.stderr
    return folder


class Read(HTMLParser):
    """A page of HTML: its tags within the article, and the addresses that a browser fetches by itself."""

    def __init__(self, text: str, *, whole: bool = False) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.classes: set[str] = set()
        self._within = whole
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Counts it, and notes what it fetches."""
        given = {name: value or "" for name, value in attrs}
        self.classes |= set(given.get("class", "").split())
        if tag == "link" and given.get("rel") not in {"canonical", "next", "prev", "alternate", "edit"}:
            self.fetched.append(given["href"])
        if tag in {"script", "img", "iframe", "source", "video", "audio", "embed", "input"}:
            self.fetched += [given[name] for name in ("src", "srcset") if given.get(name)]
        self._within = self._within or tag == "article"
        if self._within:
            self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        """Ends the article."""
        self._within = self._within and tag != "article"


def sources() -> dict[str, Path]:
    """Every page of the site, from its root, with the file that it shows."""

    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, and runs nothing that it names."""

    Loader.add_multi_constructor("", lambda *_: None)
    pages = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)["extra"]["site"]["pages"]
    found = {path.relative_to(DOCS).as_posix(): path for path in DOCS.rglob("*.md")}
    return found | {page: ROOT / path for path, page in pages.items()}


def page_of(name: str) -> str:
    """Where MkDocs writes a page."""
    return re.sub(r"README\.md$", "index.md", name).removesuffix(".md") + ".html"


# --- the site --------------------------------------------------------------------------------------------


def test_every_document_is_a_page_that_shows_what_the_repositorys_host_shows(site: Path) -> None:
    """Python-Markdown and CommonMark differ in lists, tables and fences: each is there as often."""
    host = MarkdownIt("commonmark").enable("table")
    counted = (
        "h1",
        "h2",
        "h3",
        "h4",
        "ul",
        "ol",
        "li",
        "table",
        "tr",
        "th",
        "td",
        "pre",
        "img",
        "blockquote",
    )
    assert len(sources()) > 40
    for name, source in sources().items():
        wanted = Read(host.render(source.read_text("utf-8")), whole=True).tags
        found = Read((site / page_of(name)).read_text("utf-8")).tags
        assert {tag: found[tag] for tag in counted} == {tag: wanted[tag] for tag in counted}, name


def test_nothing_that_a_page_needs_comes_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = Read(path.read_text("utf-8"))
        assert len(page.fetched) > 3
        for address in page.fetched:
            assert not re.match(r"[a-z]+:|//", address) or address.startswith("data:"), (
                f"{path.name}: {address}"
            )
            there = (path.parent / address.partition("?")[0].partition("#")[0]).resolve()
            # the page for what is not found stands anywhere, so its addresses begin at the root
            assert there.exists() or path.name == "404.html", f"{path.name}: {address}"
        # for these the theme's own scripts ask unpkg.com and the repository host's API
        assert "mermaid" not in page.classes
        assert "md-source" not in page.classes
    sheets = list(site.rglob("*.css"))
    assert sheets
    for path in sheets:
        for address in re.findall(
            r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", path.read_text("utf-8")
        ):
            assert not re.match(r"https?:|//", "".join(address)), f"{path.name}: {address}"


def test_the_search_is_in_the_site_and_finds_a_message(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    assert "reference/pruner.html#prunepolicy" in {entry["location"] for entry in index["docs"]}


# --- links that leave the documents ----------------------------------------------------------------------

SITE = Site({"docs/a.md": "a.md", "docs/sub/b.md": "sub/b.md", "services/x/README.md": "services/x.md"})
HOSTED = Site(SITE.pages, "https://host.example/hiprune", lambda path: path == "tests/chaos")


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("docs/a.md", "[b](sub/b.md#part)", "[b](sub/b.md#part)"),
        ("docs/sub/b.md", "[a](../a.md)", "[a](../a.md)"),
        ("docs/a.md", "[the x](../services/x)", "[the x](services/x.md)"),
        ("services/x/README.md", "[a](../../docs/a.md)", "[a](../a.md)"),
        ("docs/a.md", "[`k.py`](../services/x/k.py)", "`services/x/k.py`"),
        ("docs/a.md", "[faults](../tests/chaos)", "faults (`tests/chaos`)"),
        ("docs/a.md", "[out](https://other.example/a.md), [here](#there)", None),
        ("docs/a.md", "`[k](../k.py)`", None),
        ("docs/a.md", "```sh\n[k](../k.py)\n```", None),
    ],
)
def test_a_link_leads_to_the_sites_page_or_names_the_file(
    source: str, text: str, expected: str | None
) -> None:
    assert rewritten(text, source, SITE) == (expected or text)


def test_where_the_repositorys_host_is_known_a_link_leads_there() -> None:
    text = "[`k.py`](../services/x/k.py#L3) [faults](../tests/chaos) [b](sub/b.md)"
    assert rewritten(text, "docs/a.md", HOSTED) == (
        "[`k.py`](https://host.example/hiprune/blob/main/services/x/k.py#L3) "
        "[faults](https://host.example/hiprune/tree/main/tests/chaos) [b](sub/b.md)"
    )


def test_blocks_are_set_apart_from_paragraphs_and_nothing_else_is() -> None:
    assert (
        with_blocks_apart("You get\n- a\n  and more\n- b\n\nEnd") == "You get\n\n- a\n  and more\n- b\n\nEnd"
    )
    assert with_blocks_apart("Table:\n| a |\n|---|") == "Table:\n\n| a |\n|---|"
    assert with_blocks_apart("```\nx\n```\n| a |\n|---|") == "```\nx\n```\n\n| a |\n|---|"
    for same in ("- a\n- b", "# A\n- a", "```\nx\n- y\n```", "1. a\n   more\n2. b", "text\n2. is no list"):
        assert with_blocks_apart(same) == same


# --- the reference ---------------------------------------------------------------------------------------


def test_the_reference_is_what_the_protos_say() -> None:
    stale = [
        name
        for name, text in api_reference.pages().items()
        if (DOCS / "reference" / f"{name}.md").read_text("utf-8") != text
    ]
    index = api_reference.INDEX.read_text("utf-8")
    stale += ["index"] if api_reference.refreshed(index) != index else []
    assert not stale, "make protos"


def test_the_reference_of_http_is_what_the_gateway_describes() -> None:
    text = http_reference.PAGE.read_text("utf-8")
    assert text == http_reference.page(), "make tables"
    for path, operations in http_reference.described()["paths"].items():
        assert all(f"### {method.upper()} {path}\n" in text for method in operations)
    assert "| `pruning` | [`Pruning`](#pruning) | How visual tokens are pruned" in text


def test_the_reference_has_every_rpc_field_and_value_with_its_comment() -> None:
    text = "\n".join(api_reference.pages().values())
    rows = {row.partition("` |")[0].lstrip("|↳ `") for row in text.splitlines() if row.startswith("| ")}
    headings = set(re.findall(r"^##+ (\w+)$", text, flags=re.MULTILINE))
    for proto in api_reference.described():
        for service in proto.service:
            assert {service.name, *(rpc.name for rpc in service.method)} <= headings
        for message in proto.message_type:
            assert message.name in headings
            assert {each.name for each in message.field} <= rows
        for enum in proto.enum_type:
            assert enum.name in headings
            assert {value.name for value in enum.value} <= rows
    assert "| `alpha` | 4 | optional `double` | Share of the budget spent on anchors" in text
    assert not re.search(r"\|\s*\|$", text, flags=re.MULTILINE), "a row without a meaning"


def _rows(title: str) -> list[list[str]]:
    """Cells of a table of the page on errors, below its heading."""
    section = ERRORS.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_on_errors_has_every_status_and_its_reason() -> None:
    kinds = errors.HipruneError.__subclasses__()
    told = {(status.strip("`"), reason.strip("`")) for status, reason, *_ in _rows("Statuses")}
    assert told == {(kind.code.name, kind.default_reason) for kind in kinds}


def test_the_page_on_errors_has_every_reason_under_the_statuses_that_the_code_raises_it_with() -> None:
    told = {
        reason: set(re.findall(r"`(\w+)`", statuses))
        for reasons, statuses, _ in _rows("Reasons")
        for reason in re.findall(r"`(\w+)`", reasons)
    }
    kinds = {kind.__name__: kind for kind in errors.HipruneError.__subclasses__()}
    raised = {kind.default_reason: {kind.code.name} for kind in kinds.values()}
    for path in (*(ROOT / "src").rglob("*.py"), *(ROOT / "services").rglob("*.py")):
        if "gateway" in path.parts:  # its own are in the page on HTTP
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and (kind := kinds.get(ast.unparse(node.func).rpartition(".")[2])):
                for given in node.keywords:
                    if given.arg == "reason" and isinstance(given.value, ast.Constant):
                        raised.setdefault(str(given.value.value), set()).add(kind.code.name)
    raised["LIMIT_EXCEEDED"].add(
        "RESOURCE_EXHAUSTED"
    )  # gRPC's own, for a message that is too large: from_rpc
    raised |= {
        f"{peer}_{end}": {"UNAVAILABLE"}
        for peer in ("ENCODER", "PRUNER")
        for end in ("STOPPED", "UNREACHABLE")
    }
    assert told == raised
    assert set(told) == set(names.REASONS) - {"OTHER", "CLIENT_LEFT"}
