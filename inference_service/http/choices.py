"""The choices of OpenAI's completions: the text of a sample, its log-probabilities, and the count of tokens."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inference_service.engine.request import Delta, Draw, Finished, FinishReason
from shared.gpt.tokenizer import Tokenizer

_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT_LENGTH: "length",
    FinishReason.DEADLINE: "length",
}


@dataclass
class _Logprobs:
    """Columns of OpenAI's `logprobs`; offsets count characters from the beginning of the choice's text."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)


class Choice:
    """One sample of one prompt: collects its events until they are taken as JSON."""

    def __init__(self, index: int, tokenizer: Tokenizer, wants_logprobs: bool, drops_text: bool) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._wants_logprobs = wants_logprobs
        self._drops_text = drops_text
        self._text = ""
        self._logprobs = _Logprobs()
        # Of the text so far, which may end within a character.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0
        self._reason: str | None = None

    def echo(self, text: str, tokens: Sequence[Draw]) -> None:
        """Adds the prompt."""
        self._text += text
        self._add_logprobs(tokens)
        # What is generated begins with a new character.
        self._characters += len(self._utf8.decode(b"", final=True))

    def add(self, delta: Delta) -> None:
        """Adds generated text."""
        if not self._drops_text:
            self._text += delta.text
            self._add_logprobs(delta.draws)

    def finish(self, finished: Finished) -> None:
        """Notes why the sample has ended."""
        self._reason = "length" if self._drops_text else _REASONS[finished.reason]

    def take(self) -> dict[str, Any]:
        """Returns what was added since the last call, as a choice of a response."""
        logprobs, self._logprobs = self._logprobs, _Logprobs()
        text, self._text = self._text, ""
        return {
            "index": self.index,
            "text": text,
            "logprobs": vars(logprobs) if self._wants_logprobs else None,
            "finish_reason": self._reason,
        }

    def _add_logprobs(self, tokens: Sequence[Draw]) -> None:
        if not self._wants_logprobs:
            return
        into = self._logprobs
        for token in tokens:
            into.tokens.append(self._name(token.token))
            into.token_logprobs.append(token.logprob)
            top = {self._name(other.token): other.logprob for other in token.alternatives}
            into.top_logprobs.append(None if token.logprob is None else top)
            into.text_offset.append(self._offset(self._tokenizer.token_bytes(token.token)))

    def _offset(self, content: bytes) -> int:
        """Returns how many characters stand before the one to which the first of these bytes belongs; adds them."""
        before = self._characters + len(self._utf8.decode(content[:1]))
        # Unless the byte is the beginning of a character, the last character is its own.
        offset = before if not content or self._utf8.getstate()[0] else before - 1
        self._characters = before + len(self._utf8.decode(content[1:]))
        return offset

    def _name(self, token: int) -> str:
        """Returns the text of a token; of one that is no whole text its bytes, as OpenAI's API does."""
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@dataclass
class Usage:
    """Tokens that were read and generated."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
