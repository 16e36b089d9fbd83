"""The prompts for stories: words and features drawn from a vocabulary, for a teacher and for its students."""

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Names the wording, the vocabulary and the draws: change it with any of them.
TEMPLATE = "stories-1"
# The longest answer in tokens: some reasoning, and a story of a few hundred words.
MAX_TOKENS = 1024

# A prompt has each feature with this probability, in 256ths: of eight features two on average.
_FEATURE_SHARE = 64

_SYSTEM = (
    "You write short stories for children of three or four years, only with words that such children know. "
    "You answer with the story alone, as plain text: no title, no heading, no list, no markdown, no remark."
)
_USER = (
    "Write a story of three to five short paragraphs. It contains the noun “{noun}”, the verb “{verb}” and the "
    "adjective “{adjective}”, each at least once, in any form.{features} Begin in your own way, and choose names that "
    "are rare in stories."
)


@dataclass(frozen=True)
class Prompt:
    """What a story must contain: three words, and features by their names in the vocabulary."""

    noun: str
    verb: str
    adjective: str
    features: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        """Returns the messages that the teacher reads."""
        features = "".join(f" {_features()[name]}" for name in self.features)
        text = _USER.format(noun=self.noun, verb=self.verb, adjective=self.adjective, features=features)
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]

    def short(self) -> str:
        """Returns the line that a student reads, such as `Words: dog, run, happy. Features: dialogue.`."""
        words = f"Words: {self.noun}, {self.verb}, {self.adjective}."
        return f"{words} Features: {', '.join(self.features)}." if self.features else words


def draw_prompt(sample: int) -> Prompt:
    """Returns the prompt of a sample, a pure function of `TEMPLATE` and the number of the sample, from 0."""
    # A hash instead of a generator of random numbers: its draws are the same in every version of Python.
    digest = hashlib.sha256(f"{TEMPLATE}:{sample}".encode()).digest()
    nouns, verbs, adjectives = (
        words[int.from_bytes(digest[4 * at : 4 * at + 4]) % len(words)]
        for at, words in enumerate((_words("nouns"), _words("verbs"), _words("adjectives")))
    )
    features = tuple(name for name, byte in zip(_features(), digest[12:], strict=False) if byte < _FEATURE_SHARE)
    return Prompt(nouns, verbs, adjectives, features)


@cache
def _vocabulary() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("vocabulary.toml").read_text(encoding="utf-8"))


@cache
def _words(name: str) -> tuple[str, ...]:
    return tuple(str(_vocabulary()[name]).split())


@cache
def _features() -> dict[str, str]:
    return {str(name): str(sentence) for name, sentence in _vocabulary()["features"].items()}
