"""How people write a pruning policy: `policy("hiprune++", keep=1 / 3)`, `keep="33%"`, and the wire's for it.

Knows names and forms. Which values are in range depends on the model, and is the services' to say.
"""

from __future__ import annotations

from typing import Final, TypeVar

from hiprune.errors import InvalidInput
from hiprune.v1 import pruner_service_pb2 as pb

METHODS: Final = {
    name.removeprefix("METHOD_").lower().replace("_plus_plus", "++"): number
    for name, number in pb.Method.items()
    if number
}
"""Names of the methods, as people type them: `hiprune++`."""
METHOD_WORDS: Final = {number: word for word, number in METHODS.items()}
KIND_WORDS: Final = {
    number: name.removeprefix("TOKEN_KIND_").lower() for name, number in pb.TokenKind.items() if number
}
"""Why a token was kept: "anchor", "buffer", "register", "text", "control", "dominant", "diverse"."""
CACHE_WORDS: Final = {
    number: name.removeprefix("CACHE_STATUS_").lower().replace("_", " ")
    for name, number in pb.CacheStatus.items()
}
"""What people call each level of the cache: "miss", "encoded hit", "pruned hit"."""
BUFFERS: Final = {
    name.removeprefix("BUFFER_SHAPE_").lower(): number for name, number in pb.BufferShape.items() if number
}
TEXT_BUDGETS: Final = {
    name.removeprefix("TEXT_BUDGET_").lower(): number for name, number in pb.TextBudget.items() if number
}

KEEP_FORMS: Final = 'expected a share in (0, 1], a count from 2 on, or one written as "1/3", "33%", "65"'
_INT32: Final = 2**31 - 1

Number = TypeVar("Number")


def policy(
    method: str = "",
    keep: float | str | None = None,
    *,
    alpha: float | None = None,
    object_layer: int | None = None,
    beta: float | None = None,
    buffer: str = "",
    text_budget: str = "",
    scores: bool = False,
) -> pb.PrunePolicy:
    """A policy for `Client.ask`, `prune` and `prune_tokens`. What is left out is the service's default.

    method: none, hiprune, hiprune++, random, strided, visionzip, divprune: `METHODS`. keep: how many tokens
    of each image, a share in (0, 1] or a count from 2 on, also written "1/3", "33%" or "65". alpha: share of
    the budget for anchors and their neighbours. object_layer: encoder layer, from 1 on, whose attention finds
    objects. beta: share chosen by the question, of hiprune++. buffer: neighbours kept with an anchor
    (`BUFFERS`). text_budget: inside or additive. scores: also return the scores that the choice was made
    from.

    Raises InvalidInput, with the argument's name as its `field`.
    """
    made = pb.PrunePolicy(
        method=method_of(method) if method else pb.METHOD_UNSPECIFIED,
        buffer=_named(BUFFERS, buffer, "buffer") if buffer else pb.BUFFER_SHAPE_UNSPECIFIED,
        text_budget=_named(TEXT_BUDGETS, text_budget, "text_budget")
        if text_budget
        else pb.TEXT_BUDGET_UNSPECIFIED,
        include_scores=scores,
    )
    if keep is not None:
        try:
            set_keep(made, keep)
        except ValueError as error:
            raise InvalidInput(str(error), field="keep") from error
    for name, value in (("alpha", alpha), ("object_layer", object_layer), ("beta", beta)):
        if value is not None:
            try:
                setattr(made, name, value)
            except (TypeError, ValueError) as error:
                raise InvalidInput(f"got {value!r}, expected a number: {error}", field=name) from error
    return made


def method_of(name: str) -> pb.Method.ValueType:
    """The method of a name, in any case. Raises InvalidInput."""
    return _named(METHODS, name.lower(), "method")


def set_keep(made: pb.PrunePolicy, keep: float | str) -> None:
    """Sets a policy's budget: a share, or a count of tokens.

    A number up to 1 is a share, as 1 and 1.0 are the same number; text is one where it has a point, a
    fraction's bar or a per cent sign. Whether it is in range is left to who prunes, but what is no number
    that the wire could hold. Raises ValueError.
    """
    try:
        share, count = _of_text(keep.strip()) if isinstance(keep, str) else _of_number(keep)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"got {keep!r}, {KEEP_FORMS}") from error
    if share is not None:
        made.keep_ratio = share
    elif count is not None:
        made.keep_count = max(-_INT32, min(count, _INT32))


def _of_number(keep: float) -> tuple[float | None, int | None]:
    if isinstance(keep, bool):
        raise TypeError("a truth is no number")
    if float(keep) <= 1:
        return float(keep), None
    count = int(keep)
    if count != keep:
        raise ValueError("neither a share nor a count")
    return None, count


def _of_text(text: str) -> tuple[float | None, int | None]:
    if text.endswith("%"):
        return float(text[:-1]) / 100, None
    if "/" in text:
        above, below = text.split("/")
        return float(above) / float(below), None
    if "." in text or "e" in text.lower():
        return float(text), None
    return None, int(text)


def _named(names: dict[str, Number], name: str, field: str) -> Number:
    if name not in names:
        raise InvalidInput(f"got {name!r}, expected one of {', '.join(names)}", field=field)
    return names[name]
