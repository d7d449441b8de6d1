"""The two stages of an answer, on its request's clock. Knows no engine."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from hiprune.telemetry import stage


class AnswerStages:
    """Times `prefill` until the first token, and `decode` from there to the end.

    with AnswerStages() as stages:
        for token in tokens:
            stages.token()
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._decoding = False

    def __enter__(self) -> Self:
        self._open.enter_context(stage("prefill"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def token(self) -> None:
        """A token has come."""
        if not self._decoding:
            self._decoding = True
            self._open.close()
            self._open.enter_context(stage("decode"))
