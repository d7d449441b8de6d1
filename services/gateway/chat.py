"""A chat request of OpenAI's API, read strictly, and the AskImage request that it stands for.

What the API has and this service does not is refused by name, where it would change the answer, and passed
over where it would not. What the llm checks, amounts, order of turns, room in the context, is left to it: its
errors come back under the names that the client used (`naming.py`). Knows no HTTP and fetches nothing.

Source: OpenAI's API reference, "Create chat completion".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from hiprune.errors import InvalidInput, Unsupported
from hiprune.policies import KEEP_FORMS, METHODS, set_keep
from hiprune.v1 import llm_service_pb2
from hiprune.v1 import pruner_service_pb2 as pb

_ROLES: Final = {
    "system": llm_service_pb2.ROLE_SYSTEM,
    "developer": llm_service_pb2.ROLE_SYSTEM,
    "user": llm_service_pb2.ROLE_USER,
    "assistant": llm_service_pb2.ROLE_ASSISTANT,
}
_IGNORED: Final = frozenset(
    {
        *(
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "reasoning_effort",
        ),
        *("safety_identifier", "service_tier", "store", "tool_choice", "user", "verbosity"),
    }
)
"""Of OpenAI's parameters, those that change no answer here."""
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Those that would, and the values that ask for nothing; null is one for each."""
_INT32: Final = 2**31 - 1
_INT64: Final = 2**63 - 1
MAX_VALUES: Final = 100_000
"""Of a body: two bytes of JSON can make a hundred in memory, so that a bound on bytes alone is none on it."""
_MAX_ITEMS: Final = 10_000
"""Of an array; how many turns and strings are of use is the llm's to say."""
_TAG: Final = "<"
"""Begins a name that pydantic puts into the path of an error and the client knows nothing of."""


class _Strict(BaseModel):
    """JSON's own types: "5" is no number, 1 is no truth."""

    model_config = ConfigDict(strict=True, frozen=True, hide_input_in_errors=True)


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: str


class RefusalPart(_Strict):
    """Words of an earlier answer that were a refusal."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(_Strict):
    """Where an image is."""

    url: str = Field(
        description="a data: URL in base64 of a JPEG, PNG, WebP or GIF file; or a URL of a host that the "
        "gateway's operator has listed"
    )
    detail: str | None = Field(None, description="ignored: pruning decides how much of an image is read")


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _part_tag(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>"


def _content_tag(content: Any) -> str:
    return "<text>" if isinstance(content, str) else "<parts>" if isinstance(content, list | tuple) else "<?>"


_Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        _part_tag,
        custom_error_type="part",
        custom_error_message="expected a part of type text or image_url",
    ),
]
_Content: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[_Part], Field(max_length=_MAX_ITEMS, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _content_tag,
        custom_error_type="content",
        custom_error_message="expected a string or an array of parts",
    ),
]
_Stop: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=_MAX_ITEMS, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _content_tag,
        custom_error_type="stop",
        custom_error_message="expected a string or an array of strings",
    ),
]


def _keep_tag(keep: Any) -> str:
    is_number = isinstance(keep, int | float) and not isinstance(keep, bool)
    return "<text>" if isinstance(keep, str) else "<number>" if is_number else "<?>"


_Keep: TypeAlias = Annotated[
    Annotated[float, Tag("<number>")] | Annotated[str, Tag("<text>")],
    Discriminator(
        _keep_tag,
        custom_error_type="keep",
        custom_error_message="expected a number or a string",
    ),
]


class ChatMessage(_Strict):
    """One turn. Other fields of an earlier answer, sent back as it came, are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content | None = Field(None, description="words, or parts in their order")
    tool_calls: list[Any] | None = Field(None, description="refused, unless empty")


class Pruning(_Strict):
    """How visual tokens are pruned: the one extension of the API. What is left out is the model's default."""

    # kept and refused in `read_chat`: forbidden here, each of a hundred thousand would be an error of its own
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    method: Literal["none", "hiprune", "hiprune++", "random", "strided", "visionzip", "divprune"] | None = (
        Field(None, description="which tokens are kept; default: hiprune")
    )
    keep: _Keep | None = Field(
        None,
        description="how many tokens of each image: a share in (0, 1], or a count from 2 on; also "
        'written "1/3", "33%", "65"; default: 1/3',
    )
    alpha: float | None = Field(None, description="share of the budget for anchors and their neighbours")
    object_layer: int | None = Field(
        None, ge=-_INT32, le=_INT32, description="encoder layer, from 1 on, whose attention finds objects"
    )
    beta: float | None = Field(None, description="share chosen by the question, of hiprune++")
    buffer: Literal["flat", "grid", "square", "rotated_cross", "row", "column"] | None = Field(
        None, description="neighbours kept with an anchor; default: flat"
    )
    text_budget: Literal["inside", "additive"] | None = Field(
        None, description="whether tokens chosen by the question count in the budget; default: inside"
    )
    report: bool = Field(
        False, description="tell which tokens were kept of each view, and why, and the time of each stage"
    )
    scores: bool = Field(
        False, description="a report with the scores of every token, those that the method chose by"
    )


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool | None = Field(None, description="end with a chunk that has the usage")


class ChatRequest(_Strict):
    """A request. Parameters of OpenAI's API that are not listed are refused or have no effect."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(description="name of the model served: GET /v1/models")
    messages: list[ChatMessage] = Field(
        max_length=_MAX_ITEMS,
        fail_fast=True,
        description="the turns, oldest first, the last of them the user's",
    )
    stream: bool | None = Field(None, description="send the answer as it comes, as server-sent events")
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(
        None, ge=-_INT32, le=_INT32, description="most tokens of the answer; default: 256"
    )
    max_tokens: int | None = Field(
        None, ge=-_INT32, le=_INT32, description="the older name of max_completion_tokens"
    )
    temperature: float | None = Field(
        None, description="0 takes the likeliest token each time; default: 0, where OpenAI has 1"
    )
    top_p: float | None = Field(None, description="draw from the likeliest tokens of this probability")
    stop: _Stop | None = Field(None, description="strings that end the answer and are no part of it")
    seed: int | None = Field(None, ge=-_INT64, le=_INT64, description="makes a draw repeatable")
    pruning: Pruning | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_report(self) -> bool:
        """Whether the answer is to say which tokens were kept."""
        return self.pruning is not None and (self.pruning.report or self.pruning.scores)

    @property
    def wants_scores(self) -> bool:
        """Whether it is to tell their scores as well."""
        return self.pruning is not None and self.pruning.scores


def read_chat(body: bytes | bytearray) -> ChatRequest:
    """The request of a body. Raises InvalidInput, Unsupported, with the client's own name of the field.

    One of too many values is refused before it is parsed. Each but the first follows one of three signs,
    which base64 does not have: images count for nothing.
    """
    if sum(body.count(sign) for sign in b",[{") > MAX_VALUES:
        raise InvalidInput(f"the body has more than {MAX_VALUES} values", reason="LIMIT_EXCEEDED")
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    for index, message in enumerate(chat.messages):
        if message.tool_calls:
            raise Unsupported("tools are not served here", field=f"messages[{index}].tool_calls")
    for name in (chat.pruning and chat.pruning.model_extra) or ():
        raise _unknown(f"pruning.{name}")
    for name, value in (chat.model_extra or {}).items():
        if value is None or name in _IGNORED or value in _NEUTRAL.get(name, ()):
            continue
        if name not in _NEUTRAL:
            raise _unknown(name)
        only = " or ".join(repr(each) for each in (*_NEUTRAL[name], None))
        raise Unsupported(f"is not served here, expected {only} or nothing", field=name)
    if not chat.model:
        raise InvalidInput("is empty, expected the name of a model", reason="MISSING_FIELD", field="model")
    return chat


def _unknown(name: str) -> InvalidInput:
    return InvalidInput("is no parameter of this API", reason="UNKNOWN_PARAMETER", field=name[:100])


def _refusal(error: ValidationError) -> InvalidInput:
    """The first thing that is wrong, under its path in the JSON; its value is not repeated."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ""
    for step in first["loc"]:
        if isinstance(step, int):
            field += f"[{step}]"
        elif not step.startswith(_TAG):
            field += f".{step}" if field else step
    kind = first["type"]
    if kind == "json_invalid":
        return InvalidInput("the body is not JSON", reason="INVALID_JSON")
    if kind == "model_type" and not field:
        return InvalidInput("the body is no JSON object", reason="INVALID_JSON")
    reason = {"missing": "MISSING_FIELD", "too_long": "LIMIT_EXCEEDED"}.get(kind, "INVALID_FIELD")
    words = {"missing": "is missing", "too_long": f"has more than {_MAX_ITEMS} items"}
    return InvalidInput(words.get(kind, first["msg"]), reason=reason, field=field[:200])


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """An image of a request, in its order."""

    message: int
    part: int
    url: str

    @property
    def field(self) -> str:
        """Where its URL stands, as the client wrote it."""
        return f"messages[{self.message}].content[{self.part}].image_url.url"


def images_of(chat: ChatRequest) -> Iterator[ImageSlot]:
    """The images of a request, in their order."""
    for index, message in enumerate(chat.messages):
        if isinstance(message.content, list):
            for number, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield ImageSlot(index, number, part.image_url.url)


def to_request(chat: ChatRequest, images: Sequence[bytes]) -> llm_service_pb2.AskImageRequest:
    """The request for the llm; `images` are those of `images_of`, in that order. Raises InvalidInput."""
    files = iter(images)
    sampling = llm_service_pb2.Sampling(
        max_tokens=chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens,
        temperature=chat.temperature,
        top_p=chat.top_p,
        seed=chat.seed,
        stop=[chat.stop] if isinstance(chat.stop, str) else chat.stop,
    )
    request = llm_service_pb2.AskImageRequest(
        policy=_policy(chat.pruning) if chat.pruning is not None else None,
        sampling=sampling,
        model=chat.model,
    )
    for message in chat.messages:  # in place: a message given to another one's constructor is copied
        _fill(request.messages.add(), message, files)
    return request


def _fill(turn: llm_service_pb2.Message, message: ChatMessage, files: Iterator[bytes]) -> None:
    turn.role = _ROLES[message.role]
    content = message.content
    if content is None and message.role == "assistant":
        content = ""  # an answer that was empty
    if isinstance(content, str):
        turn.parts.add(text=content)
    else:
        for part in content or ():
            match part:
                case TextPart():
                    turn.parts.add(text=part.text)
                case RefusalPart():
                    turn.parts.add(text=part.refusal)
                case ImagePart():
                    turn.parts.add().media.image = next(files)


def _policy(pruning: Pruning) -> pb.PrunePolicy:
    policy = pb.PrunePolicy(
        method=METHODS[pruning.method] if pruning.method else pb.METHOD_UNSPECIFIED,
        alpha=pruning.alpha,
        object_layer=pruning.object_layer,
        beta=pruning.beta,
        buffer=f"BUFFER_SHAPE_{(pruning.buffer or 'unspecified').upper()}",  # type: ignore[arg-type]  # by name
        text_budget=f"TEXT_BUDGET_{(pruning.text_budget or 'unspecified').upper()}",  # type: ignore[arg-type]
        include_scores=pruning.scores,
    )
    if pruning.keep is not None:
        try:
            set_keep(policy, pruning.keep)
        except ValueError as error:
            raise InvalidInput(KEEP_FORMS, field="pruning.keep") from error
    return policy
