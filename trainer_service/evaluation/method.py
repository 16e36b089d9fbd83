"""The method of an evaluation. Loads no model framework."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Self

# Raise it when the same method gives other figures.
CODE = 1


@dataclass(frozen=True)
class HeldOutText:
    """A whole held-out split: its name for people, the revision of its data set, and the digest of its tokens."""

    name: str
    revision: str
    tokens: int
    text_bytes: int
    documents: int
    digest: str


@dataclass(frozen=True)
class Method:
    """Everything that figures on quality depend on besides the version itself.

    window, stride: in tokens; see `text_quality.py`.
    device: the kind of device, as `accelerator.Backend` names it.
    prompts, prompt_tokens: at `prompts` places of the held-out text, `prompt_tokens` tokens are continued.
    seeds, max_tokens, temperature: how each of them is continued.
    code: `CODE`.
    """

    text: HeldOutText
    tokenizer: str
    window: int
    stride: int
    precision: str
    device: str
    prompts: int
    prompt_tokens: int
    seeds: tuple[int, ...]
    max_tokens: int
    temperature: float
    dropout: float = 0.0
    code: int = CODE

    @property
    def windows(self) -> int:
        """The number of windows that cover the text."""
        return 1 + -(-max(self.text.tokens - self.window, 0) // self.stride)

    @property
    def digest(self) -> str:
        """SHA-256 of all values, in hexadecimal; of the text, only its tokens count."""
        values = asdict(self) | {"text": self.text.digest}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Self) -> Iterator[str]:
        """Yields a phrase for each value in which two methods differ, such as `window 128 and 256`."""
        for each in fields(self):
            mine, others = getattr(self, each.name), getattr(other, each.name)
            if mine == others or (each.name == "text" and mine.digest == others.digest):
                continue
            if each.name == "text":
                mine, others = (f"{text.name} ({text.tokens:,} tokens, {text.digest[:12]})" for text in (mine, others))
            elif each.name == "tokenizer":
                mine, others = mine[:12], others[:12]
            yield f"{each.name.replace('_', ' ')} {mine} and {others}"
