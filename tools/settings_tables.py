"""Fills the settings table of each `services/*/README.md` from the service's `settings.py`.

`python tools/settings_tables.py`. A table stands between `<!-- settings -->` and `<!-- /settings -->`; a
test holds it fresh.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from hiprune.config import ServiceSettings

ROOT: Final = Path(__file__).resolve().parent.parent
OPEN: Final = "<!-- settings -->"
CLOSE: Final = "<!-- /settings -->"


def readmes() -> list[tuple[Path, type[ServiceSettings]]]:
    """Each service's README with its settings class."""
    found: list[tuple[Path, type[ServiceSettings]]] = []
    for path in sorted((ROOT / "services").glob("*/settings.py")):
        module = importlib.import_module(f"services.{path.parent.name}.settings")
        found.append((path.parent / "README.md", module.Settings))
    return found


def refreshed(text: str, settings: type[ServiceSettings]) -> str:
    """A README with its table made anew. Raises ValueError when the markers are not there, once each."""
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        raise ValueError(f"expected {OPEN} and {CLOSE} once each")
    before, _, rest = text.partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    return f"{before}{OPEN}\n{table(settings)}\n{CLOSE}{after}"


def table(settings: type[ServiceSettings]) -> str:
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
    """Rewrites every README."""
    for path, settings in readmes():
        path.write_text(refreshed(path.read_text("utf-8"), settings), "utf-8")


if __name__ == "__main__":
    main()
