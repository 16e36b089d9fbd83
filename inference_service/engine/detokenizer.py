"""Turns tokens into text as they arrive: exact UTF-8, cut before stop texts."""

import codecs
from collections.abc import Callable, Sequence


class Detokenizer:
    """Turns the tokens of one stream into text; `token_bytes` gives the bytes of a token.

    The texts that it returns, joined, equal the text of all tokens decoded at once (U+FFFD for invalid UTF-8), cut
    before the stop text that completes first, the longest if several complete at the same character. Text is held back
    only while it may still become a stop text or a character.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._stops = sorted(stops, key=len, reverse=True)
        self._longest = max(map(len, stops), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.matched_stop: str | None = None

    def add(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Adds tokens, up to one that completes a stop text, which sets `matched_stop`.

        Returns the text that is now certain, and the number of tokens that were added.
        """
        if not self._stops:
            return self._utf8.decode(b"".join(map(self._token_bytes, tokens))), len(tokens)
        certain = ""
        for count, token in enumerate(tokens, 1):
            certain += self._advance(self._utf8.decode(self._token_bytes(token)))
            if self.matched_stop is not None:
                return certain, count
        return certain, len(tokens)

    def finish(self) -> str:
        """Returns the text that was held back, because no token follows."""
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
        """Returns how many characters at the end may begin a stop text."""
        for count in range(min(self._longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
