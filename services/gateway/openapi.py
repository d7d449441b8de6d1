"""The description of the API that `GET /openapi.json` answers with.

FastAPI knows the routes; the bodies of a chat are read by hand (`chat.py`), so their schemas are put in here.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic.json_schema import models_json_schema

from services.gateway.chat import ChatRequest

_REF: Final = "#/components/schemas/{model}"
_NUMBER: Final = {"type": "integer"}
_TEXT: Final = {"type": "string"}
_TIMINGS: Final = {"type": "object", "additionalProperties": {"type": "number"}}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}


def _object(description: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "description": description, "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


_ANSWERS: Final = {
    "Error": _object(
        "What went wrong.",
        error=_object("", message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL),
    ),
    "Usage": _object(
        "What an answer took.",
        prompt_tokens=_NUMBER,
        completion_tokens=_NUMBER,
        total_tokens=_NUMBER,
        prompt_tokens_details=_object(
            "",
            cached_tokens=_NUMBER,
            visual_tokens_before=_NUMBER,
            visual_tokens_after=_NUMBER,
            prefill_flops_before=_NUMBER,
            prefill_flops_after=_NUMBER,
        ),
    ),
    "PruningReport": _object(
        "What was pruned.",
        images=_list(
            _object(
                "One image; from `policy` on if `pruning.report` asked for it.",
                method=_TEXT,
                tokens_before=_NUMBER,
                tokens_requested=_NUMBER,
                tokens_kept=_NUMBER,
                cache=_TEXT,
                text_note=_TEXT,
                policy=_object(
                    "`pruning` with every default filled in; and the layer that the registers came from.",
                    method=_TEXT,
                    keep={"type": "number"},
                    alpha={"type": "number"},
                    object_layer=_NUMBER,
                    deep_layer=_NUMBER,
                    beta={"type": "number"},
                    buffer=_TEXT,
                    text_budget=_TEXT,
                ),
                text_model=_TEXT,
                layout=_object(
                    "Of an image in tiles: its size in pixels, and their rows and columns.",
                    original_height=_NUMBER,
                    original_width=_NUMBER,
                    tile_rows=_NUMBER,
                    tile_columns=_NUMBER,
                ),
                views=_list(
                    _object(
                        "The tokens kept of a view, by row-major index in its grid, and why.",
                        grid_height=_NUMBER,
                        grid_width=_NUMBER,
                        kept_indices=_list(_NUMBER),
                        kinds=_list(_TEXT),
                        frame=_NUMBER,
                        valid=_object(
                            "The rows and columns that show the image; absent: all.",
                            top=_NUMBER,
                            left=_NUMBER,
                            height=_NUMBER,
                            width=_NUMBER,
                        ),
                        scores=_object(
                            "Of every token, if `pruning.scores` asked for them; those that the method uses.",
                            object=_list({"type": "number"}),
                            deep=_list({"type": "number"}),
                            similarity=_list({"type": "number"}),
                            cls=_list({"type": "number"}),
                        ),
                        scores_left_out=_TEXT,
                    )
                ),
                timings_ms=_TIMINGS,
            )
        ),
        timings_ms=_TIMINGS,
    ),
    "ChatCompletion": _object(
        "An answer.",
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_NUMBER,
        model=_TEXT,
        choices=_list(
            _object(
                "",
                index=_NUMBER,
                message=_object("", role={"const": "assistant"}, content=_TEXT),
                finish_reason={"enum": ["stop", "length"]},
            )
        ),
        usage=_ref("Usage"),
        pruning=_ref("PruningReport"),
    ),
    "ChatCompletionChunk": _object(
        "A piece of an answer: the data of one server-sent event. The first has `pruning`, and with "
        "`pruning.report` so has the last that has a choice: `timings_ms` of the language model.",
        id=_TEXT,
        object={"const": "chat.completion.chunk"},
        created=_NUMBER,
        model=_TEXT,
        choices=_list(
            _object(
                "",
                index=_NUMBER,
                delta=_object("", role={"const": "assistant"}, content=_TEXT),
                finish_reason={"enum": ["stop", "length", None]},
            )
        ),
        usage={"anyOf": [_ref("Usage"), {"type": "null"}]},
        pruning=_ref("PruningReport"),
    ),
    "Model": _object(
        "A model.", id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT, engine=_TEXT
    ),
    "ModelList": _object("The models served.", object={"const": "list"}, data=_list(_ref("Model"))),
}


def content(name: str, media_type: str = "application/json") -> dict[str, Any]:
    """A body of one of the schemas."""
    return {media_type: {"schema": _ref(name)}}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers that are errors."""
    words = {
        400: "a field is wrong: `param` names it",
        401: "no key, or one that is not known",
        404: "the model is not served here",
        408: "the body did not come in time",
        413: "the body, or an image in it, is too large",
        415: "the body is not application/json",
        429: "a limit of the tenant's is reached; `retry-after` says when to come back",
        500: "an internal error",
        503: "overloaded, starting or leaving; `retry-after` says when to come back",
        504: "the deadline passed",
    }
    return {status: {"description": words[status], "content": content("Error")} for status in statuses}


def schemas() -> dict[str, Any]:
    """All schemas, by name."""
    _, found = models_json_schema([(ChatRequest, "validation")], ref_template=_REF)
    return {**found["$defs"], **_ANSWERS}
