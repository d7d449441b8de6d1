"""Claims that the documents make of the code, held against it. Reads files; starts no service."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from services.encoder.settings import Settings as EncoderSettings
from services.llm.settings import Settings as LanguageModelSettings
from services.pruner.settings import Settings as PrunerSettings

ROOT = Path(__file__).resolve().parents[2]
SECURITY = (ROOT / "docs" / "security.md").read_text("utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def defined_in(file: str) -> set[str]:
    """Names of the tests that a file defines."""
    path = ROOT / file
    tree = ast.parse(path.read_text("utf-8")) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def threats() -> list[str]:
    """The rows of the table of threats."""
    table = SECURITY.partition("## Threats and defences")[2].partition("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("| ")][1:]


def test_every_threat_names_tests_that_exist() -> None:
    assert len(threats()) > 15
    for row in threats():
        threat, _, shown = (cell.strip() for cell in row.strip("|").rsplit("|", 2))
        named = NAMED.findall(shown)
        assert named, f"{threat}: names no test"
        assert not NAMED.sub("", shown).strip(), f"{threat}: names something else than tests"
        missing = [f"{file}::{name}" for file, name in named if name not in defined_in(file)]
        assert not missing, threat


def test_the_settings_that_the_page_on_security_names_exist() -> None:
    every = {
        name
        for kind in (EncoderSettings, LanguageModelSettings, PrunerSettings)
        for name in kind.model_fields
    }
    secret = {
        name
        for kind in (EncoderSettings, LanguageModelSettings, PrunerSettings)
        for name, field in kind.model_fields.items()
        if "Secret" in str(field.annotation)
    }
    flags = set(re.findall(r"`--([a-z-]+)`", SECURITY))
    assert {flag.replace("-", "_") for flag in flags} == secret
    named = set(re.findall(r"`((?:tls|peer|max_connection|allow)_[a-z_]+)`", SECURITY))
    assert named
    assert named <= every
