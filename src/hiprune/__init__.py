"""Questions about images, answered from a third of the visual tokens: the client library of hiprune.

    async with hiprune.Client("127.0.0.1:50053") as client:
        answer = await client.ask("what is this?", image, policy=hiprune.policy("hiprune++", keep=1 / 3))

`__all__` is what stays across releases. Importing this package loads nothing: each name when it is first
used, and neither torch nor numpy with any of them.

Whatever goes wrong in a call is one of these exceptions. Each has `message`; `field`, the argument or field
that is wrong, or empty; `reason`, for programs; `code`, gRPC's status; and `retry_after_s`, or None.

    HipruneError
    ├── InvalidInput         INVALID_ARGUMENT     an argument is wrong: which, its value and the bound
    ├── Unauthenticated      UNAUTHENTICATED      no key, or an unknown one
    ├── PermissionDenied     PERMISSION_DENIED    a known caller asks for what it may not have
    ├── NotFound             NOT_FOUND            a model that is not served there
    ├── Mismatch             FAILED_PRECONDITION  the tokens, or two services, belong to different models
    ├── Exhausted            RESOURCE_EXHAUSTED   a queue is full or a quota is spent; says when to retry
    ├── Unsupported          UNIMPLEMENTED        legal, but not by this model family or engine
    ├── Unavailable          UNAVAILABLE          nobody is there, after two more attempts; safe to retry
    ├── Expired              DEADLINE_EXCEEDED    `timeout_s` passed before the answer was ready
    └── Internal             INTERNAL             unforeseen; the service's log has the cause

InvalidInput is raised before anything is sent where the client can tell. A task that is cancelled raises
`asyncio.CancelledError`, as always, and the services stop working for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hiprune.arrays import Array
    from hiprune.client import Client
    from hiprune.errors import (
        Exhausted,
        Expired,
        HipruneError,
        Internal,
        InvalidInput,
        Mismatch,
        NotFound,
        PermissionDenied,
        Unauthenticated,
        Unavailable,
        Unsupported,
    )
    from hiprune.policies import policy
    from hiprune.questions import sampling, video
    from hiprune.results import Answer, Encoded, EncodedView, Pruned, PrunedView, Scores, View

__all__ = [
    "Answer",
    "Array",
    "Client",
    "Encoded",
    "EncodedView",
    "Exhausted",
    "Expired",
    "HipruneError",
    "Internal",
    "InvalidInput",
    "Mismatch",
    "NotFound",
    "PermissionDenied",
    "Pruned",
    "PrunedView",
    "Scores",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "View",
    "policy",
    "sampling",
    "video",
]

_HOMES = {
    "arrays": ("Array",),
    "client": ("Client",),
    "policies": ("policy",),
    "questions": ("sampling", "video"),
    "results": ("Answer", "Encoded", "EncodedView", "Pruned", "PrunedView", "Scores", "View"),
}
"""Which module has which name; `errors` has the rest."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "errors")
    value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
