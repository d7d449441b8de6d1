"""What the site of the documents needs beside MkDocs: pages from outside `docs/`, and links that leave it.

A hook of mkdocs.yml. The documents are written for the repository's host, where a link leads to a file
wherever it lies. In the site, a file that is one of its pages (`extra.site.pages`) or that has one in its
place (`extra.site.instead`) is linked to as that page, and what was measured lies beside the pages. Any other
file is linked to at the repository's address, where one is configured (`HIPRUNE_REPOSITORY`), and named by
its path where not. Knows no content.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = "benchmarks/results"

_CODE_OR_LINK: Final = re.compile(
    r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[ \t]*$"
    r"|(?P<image>!?)\[(?P<text>(?:`[^`\n]*`|[^\]`])*)\]\((?P<to>[^)\s]+)\)"
    r"|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)
_FENCE: Final = re.compile(r"\s*(`{3,}|~{3,})")
_ITEM: Final = re.compile(r"(?:[-*+]|1\.)\s")


@dataclass(frozen=True, slots=True)
class Site:
    """Where the repository's files are in the site. Paths are POSIX, from the repository's root."""

    pages: Mapping[str, str]
    """Page or file of the site, from its root, by the path of the file that it shows."""
    repository: str = ""
    """Address of the repository on its host, without a slash at the end; empty: not known."""
    is_folder: Callable[[str], bool] = lambda _: False

    def page_of(self, path: str) -> str:
        """The page of a file, or of a folder's README; empty when it has none."""
        return self.pages.get(path) or self.pages.get(f"{path}/README.md", "")

    def address_of(self, path: str) -> str:
        """Where the host shows a file or folder; empty when no host is known."""
        kind = "tree" if self.is_folder(path) else "blob"
        return f"{self.repository}/{kind}/main/{path}" if self.repository else ""


def rewritten(markdown: str, source: str, site: Site) -> str:
    """A document's text with links as the site has them. `source` is the document's own path."""
    here = posixpath.dirname(site.page_of(source))

    def link(match: re.Match[str]) -> str:
        image, text, to = match["image"], match["text"], match["to"]
        if to is None or re.match(r"[a-z]+:|#|/", to):  # code, or none of ours
            return match[0]
        path, hash_sign, anchor = to.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if page := site.page_of(path):
            return f"{image}[{text}]({posixpath.relpath(page, here or '.')}{hash_sign}{anchor})"
        if address := site.address_of(path):
            return f"{image}[{text}]({address}{hash_sign}{anchor})"
        return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    return _CODE_OR_LINK.sub(link, markdown)


def with_blocks_apart(markdown: str) -> str:
    """The text with an empty line before each list and table that follows a paragraph, and behind each fence:
    CommonMark needs none there, Python-Markdown does."""
    lines: list[str] = []
    fence, within = "", ""  # the fence that is open; what the last line was of: paragraph, list, table, fence
    for line in markdown.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence, within = "", "fence"
        elif mark:
            fence = mark[1]
        elif not line.strip() or line.startswith("#"):
            within = ""
        else:
            starts = "list" if _ITEM.match(line) else "table" if line.startswith("|") else ""
            if within == "fence" or (starts and within == "paragraph"):
                lines.append("")
                within = ""
            within = starts or within or ("list" if line[0].isspace() else "paragraph")
        lines.append(line)
    return "\n".join(lines)


# --- MkDocs' events --------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts every page of a folder where the navigation names the folder: its README first, then by name."""
    for section in config.nav or ():
        for entries in section.values():
            for entry in entries:
                for title, to in entry.items() if isinstance(entry, dict) else ():
                    if isinstance(to, str) and to.endswith("/"):
                        names = sorted(path.name for path in (Path(config.docs_dir) / to).glob("*.md"))
                        entry[title] = [to + name for name in sorted(names, key="README.md".__ne__)]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages from outside `docs/`, and what was measured."""
    for path, page in sorted({**_settings(config)["pages"], **_measured()}.items()):
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites a page's links, and sets its blocks apart."""
    settings = _settings(config)
    beside: dict[str, str] = settings["pages"]
    folder = Path(config.docs_dir).relative_to(ROOT).as_posix()
    pages = {
        **{f"{folder}/{file.src_uri}": file.src_uri for file in files},
        **_measured(),
        **beside,
        **settings["instead"],
    }
    site = Site(pages, (settings["repository"] or "").rstrip("/"), lambda path: (ROOT / path).is_dir())
    sources = {uri: path for path, uri in beside.items()}
    source = sources.get(page.file.src_uri, f"{folder}/{page.file.src_uri}")
    return with_blocks_apart(rewritten(markdown, source, site))


def _measured() -> dict[str, str]:
    names = sorted(path.name for path in (ROOT / RESULTS).iterdir())
    return {f"{RESULTS}/{name}": f"{RESULTS}/{name}" for name in names}


def _settings(config: MkDocsConfig) -> dict[str, Any]:
    found: dict[str, Any] = config.extra["site"]
    return found
