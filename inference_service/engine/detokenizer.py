"""Tokens to text, as they come: exact UTF-8, and stop texts that never show."""

import codecs
from collections.abc import Callable, Sequence


class Detokenizer:
    """Turns the tokens of one stream into text.

    What it returns, joined, is the text of all tokens decoded at once (U+FFFD for bytes that are no UTF-8), cut before
    the first place at which a stop text is complete; of stop texts complete at the same character the longest counts.
    Text is held back only while it may still become a stop text or a character.
    """

    def __init__(self, piece: Callable[[int], bytes], stops: Sequence[str] = ()) -> None:
        self._piece = piece
        self._stops = sorted(stops, key=len, reverse=True)
        self._longest = max(map(len, stops), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.matched_stop: str | None = None

    def add(self, token: int) -> str:
        """The text that is certain with one more token; `matched_stop` is set where a stop text is complete."""
        return self._advance(self._utf8.decode(self._piece(token)))

    def finish(self) -> str:
        """The text that was held back, now that no token follows."""
        text = self._advance(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _advance(self, text: str) -> str:
        if self.matched_stop is not None:
            return ""
        seen = len(self._held)
        self._held += text
        for end in range(seen + 1, len(self._held) + 1):
            for stop in self._stops:
                if self._held.endswith(stop, 0, end):
                    certain, self._held, self.matched_stop = self._held[: end - len(stop)], "", stop
                    return certain
        keep = self._possible_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _possible_stop(self) -> int:
        """How many characters at the end begin a stop text."""
        for count in range(min(self._longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
