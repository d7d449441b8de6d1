"""Fills the settings table of each `services/*/README.md` from the service's `settings.py`, and the list of
all settings in `docs/operations.md`.

`python tools/settings_tables.py`. What is made stands between `<!-- settings -->` and `<!-- /settings -->`;
tests hold it fresh.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from hiprune.config import ProcessSettings, ServiceSettings

ROOT: Final = Path(__file__).resolve().parent.parent
OPERATIONS: Final = ROOT / "docs" / "operations.md"
OPEN: Final = "<!-- settings -->"
CLOSE: Final = "<!-- /settings -->"


def readmes() -> list[tuple[Path, type[ProcessSettings]]]:
    """Each service's README with its settings class."""
    found: list[tuple[Path, type[ProcessSettings]]] = []
    for path in sorted((ROOT / "services").glob("*/settings.py")):
        module = importlib.import_module(f"services.{path.parent.name}.settings")
        found.append((path.parent / "README.md", module.Settings))
    return found


def refreshed(text: str, settings: type[ProcessSettings]) -> str:
    """A README with its table made anew. Raises ValueError when the markers are not there, once each."""
    return _filled(text, table(settings))


def refreshed_reference(text: str) -> str:
    """The page on operations with its list made anew. Raises ValueError as `refreshed`."""
    return _filled(text, reference())


def _filled(text: str, content: str) -> str:
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        raise ValueError(f"expected {OPEN} and {CLOSE} once each")
    before, _, rest = text.partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    return f"{before}{OPEN}\n{content}\n{CLOSE}{after}"


def reference() -> str:
    """Every setting, each once: what all processes have, what those with a model have, and each one's own."""
    processes = ProcessSettings.model_fields
    common = {name: field for name, field in processes.items() if name != "listen"}
    models = {name: f for name, f in ServiceSettings.model_fields.items() if name not in processes}
    parts = [
        ("Every process", "HIPRUNE_<SERVICE>_", common),
        ("The encoder, the pruner and the llm", "HIPRUNE_<SERVICE>_", models),
    ]
    for path, settings in readmes():
        own = {n: f for n, f in settings.model_fields.items() if n not in common and n not in models}
        parts.append((f"The {path.parent.name}", settings.env_prefix, own))
    lines: list[str] = []
    for title, prefix, fields in parts:
        lines += ["", f"### {title}", "", "| variable | default | meaning |", "|---|---|---|"]
        for name, field in fields.items():
            meaning = ((field.description or "") + _range(field)).replace("|", r"\|")
            lines.append(f"| `{prefix}{name.upper()}` | {_default(field)} | {meaning} |")
    return "\n".join([*lines[1:], ""])


def table(settings: type[ProcessSettings]) -> str:
    """The settings as Markdown: the service's own first, then those that every service has."""
    lines = [
        "| flag | variable, where no flag is given | default | meaning |",
        "|---|---|---|---|",
    ]
    common = ServiceSettings.model_fields
    for name, field in sorted(settings.model_fields.items(), key=lambda item: item[0] in common):
        flag = f"--{name.replace('_', '-')}"
        meaning = (field.description or "") + _range(field)
        cells = (
            f"`{flag}`",
            f"`{settings.env_prefix}{name.upper()}`",
            _default(field),
            meaning.replace("|", r"\|"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    """The default as a person would type it."""
    value: Any = field.get_default()
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool):
        return "on" if value else "off"
    shown = str(value).removeprefix(f"{ROOT}/")
    return f"`{shown}`" if shown else "empty"


def _range(field: FieldInfo) -> str:
    """`; 1 to 16`, or nothing for a setting without bounds."""
    bounds = {
        name: getattr(constraint, name)
        for constraint in field.metadata
        for name in ("ge", "le")
        if hasattr(constraint, name)
    }
    if not bounds:
        return ""
    low, high = bounds.get("ge"), bounds.get("le")
    if high is None:
        return f"; at least {low}"
    return f"; at most {high}" if low is None else f"; {low} to {high}"


def main() -> None:
    """Rewrites every README, and the page on operations."""
    for path, settings in readmes():
        path.write_text(refreshed(path.read_text("utf-8"), settings), "utf-8")
    OPERATIONS.write_text(refreshed_reference(OPERATIONS.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
