"""A completion's text while it grows."""

from __future__ import annotations

from collections.abc import Sequence

from r1.engine.data.tokenizer import Tokenizer


class TextStream:
    """Tokens in, text out: what is whole UTF-8 and cannot turn out to begin one of the strings `stop`. The text ends
    before the first of these."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._next = tokenizer.stream()
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token makes safe to show; `stopped` says that it was the last."""
        self._held += self._next(token)
        found = [place for place in map(self._held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        kept = max(map(self._beginning, self.stop), default=0)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def finish(self) -> str:
        """What was held back, where no further token comes. Bytes that are no whole character are left out."""
        shown, self._held = self._held, ""
        return shown

    def _beginning(self, stop: str) -> int:
        """How many of the last characters may be the beginning of this string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
