"""Claims that the page on operations makes of the code, held against it. Reads files; starts no service."""

from __future__ import annotations

import re

from hiprune.telemetry import names
from tools import settings_tables

PAGE = settings_tables.OPERATIONS.read_text("utf-8")
GUIDE = PAGE.partition("## When something is wrong")[2].partition("\n## ")[0]
SOURCE = "\n".join(
    path.read_text("utf-8")
    for folder in ("src/hiprune", "services")
    for path in sorted((settings_tables.ROOT / folder).rglob("*.py"))
)


def test_every_setting_is_listed_once() -> None:
    assert settings_tables.refreshed_reference(PAGE) == PAGE, "make tables"
    listed = re.findall(r"^\| `HIPRUNE_(?:<SERVICE>|[A-Z]+?)_(\w+)` \|", PAGE, flags=re.MULTILINE)
    for _, settings in settings_tables.readmes():
        assert {name.upper() for name in settings.model_fields} <= set(listed)


def test_the_guide_names_metrics_reasons_and_lines_of_the_log_that_exist() -> None:
    said = re.findall(r"`([^`]+)`", GUIDE)
    metrics = [each for each in said if each.startswith("hiprune_")]
    assert len(set(metrics)) > 8
    series = names.prometheus_series()
    for each in metrics:
        assert each in series or f"{each}_bucket" in series, each
    reasons = set(re.findall(r"reason ([A-Z_]+)", GUIDE)) | {"MODEL_MISMATCH"}
    assert reasons <= set(names.REASONS)
    # words between backticks with blanks in them are a log's or an error's, but for commands
    lines = [each for each in said if " " in each and not re.match(r"kubectl|hiprune |maxmemory", each)]
    assert len(lines) > 8
    flat = re.sub(r'"\s+f?"', "", SOURCE)
    for each in lines:
        for part in re.split(r"…|\{[^}]*\}", each):
            assert part.strip() in flat, part


def test_the_commands_of_the_page_are_there() -> None:
    for command in ("tenant add", "tenant key", "tenant remove", "cache purge", "cache stats"):
        assert f"hiprune {command}" in PAGE
        group, name = command.split()
        module = {"tenant": "commands/tenants", "cache": "commands/cache"}[group]
        text = (settings_tables.ROOT / "src/hiprune" / f"{module}.py").read_text("utf-8")
        assert re.search(rf'^def {name.replace("-", "_")}\(|command\("{name}"\)', text, flags=re.MULTILINE), (
            command
        )
