"""Where the figures of README.md and docs/*.md come from: `docs/figures.yaml`, held against the results.

`python tools/figures.py` prints what does not hold, and for figures below a heading that is not declared yet
the numbers that they may be, of the results to which that section links. A figure is a number with a unit, a
sign × or a decimal point; in a section that links to a file of `benchmarks/results`, any number from 10 on.
What is code, a date, or part of a name is none, and neither is a number in words.

`docs/figures.yaml` has, by page and heading, every figure in the order in which it stands there:

    83.2 ms = service_tax.three_processes_ms.median    a number of a result, rounded to the digits shown
    0.4 % = soak.memory.encoder.growth * 100           arithmetic with such numbers
    302 MB = 576 * 2 * 32 * 4096 * 2 / 1e6             arithmetic alone, where the page says that it is
    170 TFLOP = about 344.6 / 2                        rounded to the digits before the zeros
    98.7 (the paper)                                   what others have measured, or a setting: whose it is

A name is a result's file; what follows is looked for in its `results`, then at its top. `cases(at_once=16)`
is the one item of a list that has that. Decisions are left out: they are records of their day. Knows no page.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
DECLARED: Final = ROOT / "docs" / "figures.yaml"

_UNIT: Final = r"(?:[kKMG]i?B|[mµ]?s|%|[TGM]?FLOPs?(?:/s)?|[GT]B/s|tokens/s|times)(?![\w/])"
_NUMBER: Final = r"\d{1,3}(?:[  ]\d{3})+(?![\d.])|\d+(?:\.\d+)?(?:e-?\d+)?"
_FIGURE: Final = re.compile(
    rf"(?<![\w.\-/])(?P<sign>× ?)?(?P<number>{_NUMBER})(?P<unit> ?{_UNIT})?(?P<rest>\w*)"
)
_MADE: Final = re.compile(  # by a tool, and held by its test; and fences, where # begins a comment
    r"<!-- (?P<name>[a-z_-]+) -->.*?<!-- /(?P=name) -->|^(?P<fence>`{3,}).*?^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_NAMES: Final = re.compile(
    r"<!--.*?-->|`[^`\n]+`|(?<=\])\([^)\s]+\)"
    r"|\d{4}-\d\d-\d\d|\d+ [A-Z][a-z]+ \d{4}|arXiv \S+|\b[Dd]ecision \d+|^\d+\. "
    r"|\d+\.\d+\.[\d.]+|(?:Python|Kubernetes|vLLM|Triton) \d\S*"
    r"|\d+(?:\.\d+)?-[a-z]+",  # a 24-layer model
    re.MULTILINE | re.DOTALL,
)
_ORDINALS: Final = frozenset({"st", "nd", "rd", "th"})
_DECLARATION: Final = re.compile(
    r"(?P<figure>[^=(]+?) (?:= (?P<about>about )?(?P<expression>.+)|\((?P<whose>.+)\))"
)


@dataclass(frozen=True, slots=True)
class Section:
    """What stands below one heading of a page, and the results that it links to, by their names."""

    title: str
    figures: tuple[str, ...]
    results: frozenset[str]


def pages() -> dict[str, str]:
    """Text of every page that this is about, by its path."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def sections(text: str) -> list[Section]:
    """The sections of a page that have figures."""
    parts = re.split(r"^#+ (.+)$", _MADE.sub("", text), flags=re.MULTILINE)
    found = []
    for title, body in zip(["", *parts[1::2]], parts[::2], strict=True):
        linked = frozenset(re.findall(r"benchmarks/results/(\w+)\.json", body))
        figures = tuple(_figures(_NAMES.sub(" ", body), measured=bool(linked)))
        if figures:
            found.append(Section(title, figures, linked))
    return found


def _figures(prose: str, *, measured: bool) -> Iterator[str]:
    for match in _FIGURE.finditer(prose):
        number, unit = match["number"], (match["unit"] or "").strip()
        if match["rest"] and match["rest"] not in _ORDINALS:
            continue  # part of a name: 3B, 1k, 24×24 has no letter behind it, and is no figure of this
        is_ratio = bool(match["sign"]) and "." in number
        if unit or "." in number or "e" in number or (measured and value_of(number) >= 10):
            yield f"{'× ' if is_ratio else ''}{number}{' ' if unit else ''}{unit}"


def value_of(figure: str) -> float:
    """The number of a figure."""
    match = re.search(_NUMBER, figure)
    if match is None:
        raise ValueError(f"{figure!r}: no number")
    return float(re.sub(r"[  ]", "", match[0]))


# --- what it is declared to be ---------------------------------------------------------------------------


def problems(page: str, text: str, declared: Mapping[str, list[str]]) -> list[str]:
    """What does not hold of a page: a line each, for a person."""
    found = []
    here = sections(text)
    for title in declared.keys() - {section.title for section in here}:
        found.append(f"{page}: figures are declared below {title!r}, and there are none")
    for section in here:
        place = f"{page}, {section.title!r}"
        said = [_parsed(line) for line in declared.get(section.title, [])]
        names = [each["figure"] for each in said]
        if names != list(section.figures):
            found.append(f"{place}: {_difference(section.figures, names)}")
        for line in declared.get(section.title, []):
            if wrong := why_not(line, text):
                found.append(f"{place}: {line}: {wrong}")
    return found


def _parsed(line: str) -> re.Match[str]:
    match = _DECLARATION.fullmatch(line)
    if match is None:
        raise ValueError(f"{DECLARED.name}: {line!r} is neither FIGURE = EXPRESSION nor FIGURE (WHOSE)")
    return match


def _difference(written: tuple[str, ...], declared: list[str]) -> str:
    """The first place at which the page and what is declared for it part."""
    place = next(
        (i for i, pair in enumerate(zip(written, declared, strict=False)) if pair[0] != pair[1]), None
    )
    if place is None:
        place = min(len(written), len(declared))
    behind = f"behind {written[place - 1]!r} " if place else ""
    page = repr(written[place]) if place < len(written) else "nothing"
    told = repr(declared[place]) if place < len(declared) else "nothing"
    return f"{behind}the page has {page} and {DECLARED.name} {told}"


def why_not(line: str, text: str) -> str:
    """Why a declared figure of a page is not what the line says; empty when it is, or is somebody else's."""
    each = _parsed(line)
    if not each["expression"]:
        return ""
    try:
        tree = ast.parse(each["expression"], mode="eval").body
        value = _value(tree)
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in _FUNCTIONS}
    if not names and not isinstance(tree, ast.BinOp):
        return "a number is not where a number comes from"
    for name in sorted(names):
        # README and others give a figure of docs/performance.md, which links to every result
        if f"results/{name}.json" not in text and "performance.md" not in text:
            return f"the page does not link to {name}.json"
    if not isinstance(value, int | float) or not shows(each["figure"], value, about=bool(each["about"])):
        return f"is {value}"
    return ""


def shows(figure: str, value: float, *, about: bool = False) -> bool:
    """Whether a figure is a value rounded to the digits shown; `about`: to those before its zeros."""
    shown = value_of(figure)
    digits = re.search(_NUMBER, figure)
    text = re.sub(r"[  ]", "", digits[0]) if digits else ""
    mantissa, _, exponent = text.partition("e")
    step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    if about and "." not in mantissa:
        step *= 10 ** (len(mantissa) - len(mantissa.rstrip("0")))
    return math.isclose(shown, value, rel_tol=0, abs_tol=0.5 * step * (1 + 1e-9))


@cache
def _result(name: str) -> Any:
    content = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return {**content, **content["results"]} if isinstance(content["results"], dict) else content


_OPERATORS: Final[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "min": min,
    "max": max,
    "sum": sum,
    "len": len,
    "round": round,
}


def _value(node: ast.expr) -> Any:
    """What an expression is. Raises KeyError, IndexError, TypeError or ValueError where it is nothing."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            if not (RESULTS / f"{node.id}.json").exists():
                raise ValueError(f"no result is called {node.id}")
            return _result(node.id)
        case ast.Attribute():
            return _value(node.value)[node.attr]
        case ast.Subscript():
            return _value(node.value)[_value(node.slice)]
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(node.left), _value(node.right))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand)
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS and not node.keywords:
            return _FUNCTIONS[name](*map(_value, node.args))
        case ast.Call() if not node.args:
            wanted = {each.arg: _value(each.value) for each in node.keywords}
            found = [item for item in _value(node.func) if all(item[key] == wanted[key] for key in wanted)]
            if len(found) != 1:
                raise ValueError(f"{len(found)} items have {wanted}")
            return found[0]
        case ast.ListComp() | ast.GeneratorExp():
            raise ValueError("say it without a loop")
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")


def declared() -> dict[str, dict[str, list[str]]]:
    """`docs/figures.yaml`: lines, by heading, by page."""
    found: dict[str, dict[str, list[str]]] = yaml.safe_load(DECLARED.read_text("utf-8"))
    return found


# --- for who writes a page -------------------------------------------------------------------------------


def _leaves(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number below a value, with the expression for it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{place}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def candidates(figure: str, results: frozenset[str]) -> list[str]:
    """Expressions that the figure may be, of the results given: a number, over 1000, or as a percentage."""
    found = []
    for name in sorted(results):
        content = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        kept = {key: content[key] for key in ("settings",) if key in content}
        for path, value in [*_leaves(content["results"], name), *_leaves(kept, name)]:
            for factor, shown in ((1, ""), (1e-3, " / 1000"), (100, " * 100"), (1024**-1, " / 1024")):
                if shows(figure, value * factor):
                    found.append(path + shown)
    return found


def main() -> None:
    """Prints what does not hold, and what may be meant."""
    known = declared()
    for page, text in pages().items():
        for line in problems(page, text, known.get(page, {})):
            print(line)
        for section in sections(text):
            if section.title not in known.get(page, {}):
                print(f"\n{page}:\n  {section.title}:")
                for figure in section.figures:
                    first, *others = candidates(figure, section.results) or ["?"]
                    or_else = f"  # or {', '.join(others[:4])}" if others else ""
                    print(f"    - {figure} = {first}{or_else}")


if __name__ == "__main__":
    main()
