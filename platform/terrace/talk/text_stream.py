"""An answer's text while its tokens come: characters are told when they are whole, and stop words never.

A token may hold part of a character, and a stop word may come in pieces, so the end of what is known is held back for as
long as it may still become another thing. The pieces joined are the text of all tokens, up to the stop word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what half a character decodes to
LONGEST_CHARACTER = 4  # tokens of bytes


class TextStream:
    """`push` takes tokens and returns the text that is certain by then; `end` what is left. `stopped`: a stop word came."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [word for word in stop if word]
        self._tokens: list[int] = []
        self._from = self._told = 0  # tokens from which is decoded, and up to which the text went into `_waiting`
        self._waiting = ""
        self._begun = self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        if self.stopped:
            return ""
        self._tokens += tokens
        before = self._decode(self._tokens[self._from : self._told])
        text = self._decode(self._tokens[self._from :])
        if text.endswith(BROKEN) and len(self._tokens) - self._told < LONGEST_CHARACTER:
            return ""
        self._from, self._told = self._told, len(self._tokens)
        return self._certain(text[len(before) :])

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._from : self._told])
        rest = self._certain(self._decode(self._tokens[self._from :])[len(before) :])
        if self.stopped:
            return rest
        rest, self._waiting = rest + self._waiting, ""
        return rest

    def _certain(self, text: str) -> str:
        if not self._begun:  # the space that some families write before an answer
            text = text.lstrip()
            self._begun = bool(text)
        self._waiting += text
        found = [place for word in self._stop if (place := self._waiting.find(word)) >= 0]
        if found:
            self.stopped = True
            return self._waiting[: min(found)]
        held = max((_overlap(self._waiting, word) for word in self._stop), default=0)
        certain = self._waiting[: len(self._waiting) - held]
        self._waiting = self._waiting[len(certain) :]
        return certain


def _overlap(text: str, word: str) -> int:
    """Letters at the end of `text` with which `word` begins."""
    return next((count for count in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:count])), 0)
