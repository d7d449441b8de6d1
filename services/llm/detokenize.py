"""Text from token ids as they come, up to a stop string. Knows a tokenizer; knows no model.

ids ──TokenText──▶ text ──StopFilter──▶ deltas
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

_BROKEN: Final = "\ufffd"


class TokenText:
    """Incremental decoding: what comes out, in order, is the decoding of all tokens at once.

    A character made of several tokens comes out with the last of them. Special tokens are skipped. The one
    exception: bytes that are no UTF-8 make byte-fallback decoders rewrite the bytes before them too; what
    is out stays, and each broken byte shows as U+FFFD. (tokenizers' own DecodeStream raises there.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # decoding depends on a token's left neighbours: a window is decoded with those already out
        self._window: list[int] = []
        self._out = 0
        """Tokens of the window whose text is out."""

    def push(self, token: int) -> str:
        """The text that this token completes, often none."""
        self._window.append(token)
        text = self._new_text()
        if not text or text.endswith(_BROKEN):  # perhaps the first bytes of a character
            return ""
        del self._window[: self._out]
        self._out = len(self._window)
        return text

    def finish(self) -> str:
        """What was held back: the bytes of a character that never came."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._out])
        whole = self._decode(self._window)
        if whole.startswith(before):
            return whole[len(before) :]
        return self._decode(self._window[self._out :])

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class StopFilter:
    """Passes text on up to the first stop string to be completed; holds back what might begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """A stop string was met; nothing more comes out."""

    def push(self, text: str) -> str:
        """The text that surely is before any stop string."""
        if self.stopped:
            return ""
        self._held += text
        # the string completed first ends the answer, so that the cut does not depend on how text arrives
        met = [(found + len(stop), found) for stop in self._stops if (found := self._held.find(stop)) >= 0]
        if met:
            self.stopped = True
            cut = min(met)[1]
        else:
            cut = len(self._held) - self._open_chars()
        passed, self._held = self._held[:cut], "" if self.stopped else self._held[cut:]
        return passed

    def finish(self) -> str:
        """What was held back: the text has ended, so no stop string comes any more."""
        held, self._held = self._held, ""
        return held

    def _open_chars(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """Deltas of an answer from its tokens. `stopped` says that a stop string was met."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._text = TokenText(tokenizer)
        self._filter = StopFilter(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._filter.stopped

    def push(self, token: int) -> str:
        """New text of the answer, often none."""
        return self._filter.push(self._text.push(token))

    def finish(self) -> str:
        """The rest of the answer, after its last token."""
        return self._filter.push(self._text.finish()) + self._filter.finish()
