"""Writes the reference of the HTTP API, `docs/reference/http.md`, from what `GET /openapi.json` answers.

`python tools/http_reference.py`, which `make tables` runs; a test holds it fresh. Knows the shapes of OpenAPI
that the gateway uses, and refuses others. Starts no gateway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

from services.gateway.app import Gateway, make_app
from services.gateway.pages import Playground
from services.gateway.settings import Settings

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "reference" / "http.md"
_INTRODUCTION: Final = """# HTTP
<!-- made by tools/http_reference.py from the gateway's OpenAPI: make tables -->

What a gateway answers to `GET /openapi.json`, for reading. [Over HTTP](../http.md) has examples, headers, and
what each error means. Where there are tenants, a key goes along: `Authorization: Bearer KEY`."""

Schema = Mapping[str, Any]


def described() -> Schema:
    """The OpenAPI document. No handler runs, so there is no gateway behind it; pages are no part of it."""
    no_pages = Playground(Settings.read(["--no-playground"], {}))
    found: Schema = make_app(cast(Gateway, None), no_pages).openapi()
    return found


def page() -> str:
    """The text of the page."""
    api = described()
    return "\n".join((_INTRODUCTION, *_paths(api), *_schemas(api))) + "\n"


def _paths(api: Schema) -> Iterator[str]:
    yield from ("", "## Paths")
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            yield from ("", f"### {method.upper()} {path}", f"{operation['summary']}.")
            if body := operation.get("requestBody"):
                yield from ("", f"Takes {_contents(body)}.")
            yield from ("", "| status | answer | when |", "|---|---|---|")
            for status, answer in sorted(operation["responses"].items()):
                when = answer["description"] if answer["description"] != "Successful Response" else ""
                yield f"| {status} | {_contents(answer)} | {_cell(when)} |"
            if headers := operation["responses"].get("200", {}).get("headers"):
                yield from ("", f"With 200 come the headers {', '.join(f'`{name}`' for name in headers)}.")


def _contents(holder: Schema) -> str:
    """`ChatCompletion, or as text/event-stream ChatCompletionChunk`."""
    found = []
    for kind, content in holder.get("content", {}).items():
        if content["schema"]:
            found.append(f"{'' if kind == 'application/json' else f'as `{kind}` '}{_type(content['schema'])}")
    return ", or ".join(found)


def _schemas(api: Schema) -> Iterator[str]:
    yield from ("", "## Objects")
    for name, schema in sorted(
        api["components"]["schemas"].items(), key=lambda item: _ORDER.get(item[0], 99)
    ):
        yield from ("", f"### {name}", schema["description"], "")
        rows = list(_rows(api, schema, ""))
        columns = 3 if any(row[2] for row in rows) else 2  # the fields of OpenAI's own objects say it all
        for row in (("field", "type", "meaning"), ("---",) * 3, *rows):
            yield f"| {' | '.join(row[:columns])} |"


_ORDER: Final = {
    name: place
    for place, name in enumerate(
        (
            "ChatRequest",
            "Pruning",
            "ChatMessage",
            "TextPart",
            "ImagePart",
            "ImageUrl",
            "RefusalPart",
            "StreamOptions",
        )
    )
}
"""Objects as a request has them, and then the answers'."""


def _rows(api: Schema, schema: Schema, prefix: str) -> Iterator[tuple[str, str, str]]:
    """A row for each field, those of objects without a name behind their own."""
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        inner = field.get("items", field) if field.get("type") == "array" else field
        meaning = field.get("description", "") or inner.get("description", "") or _of_reference(api, field)
        if name in required:
            meaning = f"{meaning}; required" if meaning else "required"
        yield f"`{prefix}{name}`", _type(field), _cell(meaning)
        if "properties" in inner:
            yield from _rows(api, inner, f"{prefix}{name}{'[]' if inner is not field else ''}.")


def _of_reference(api: Schema, field: Schema) -> str:
    """What an optional object of another name is said to be, where its field says nothing."""
    kinds = [kind["$ref"] for kind in field.get("anyOf", ()) if "$ref" in kind]
    if len(kinds) != 1:
        return ""
    described: str = api["components"]["schemas"][kinds[0].rpartition("/")[2]]["description"]
    return described


def _type(schema: Schema) -> str:
    """A type in words: `array of TextPart or ImagePart`. Raises ValueError for a kind not met before."""
    match schema:
        case {"$ref": str(to)}:
            name = to.rpartition("/")[2]
            return f"[`{name}`](#{name.lower()})"
        case {"anyOf": kinds} | {"oneOf": kinds}:
            # null is as good as nothing in every place that takes it
            return " or ".join(_type(kind) for kind in kinds if kind != {"type": "null"})
        case {"const": value}:
            return f"`{value}`"
        case {"enum": values}:
            return ", ".join(f"`{value}`" for value in values if value is not None)
        case {"type": "array", "items": items}:
            return f"array of {_type(items)}" if items else "array"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object of {_type(values)} values"
        case {"type": "object"}:
            return "object"
        case {"type": [kind, "null"]} | {"type": str(kind)}:
            return f"{kind}"
    if schema in ({}, True):
        return "anything"
    raise ValueError(f"{schema} has no words here")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def main() -> None:
    """Rewrites the page."""
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
