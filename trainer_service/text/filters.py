"""Decides which stories of a large teacher are used: those that pass every filter.

A story is dropped for the first of these reasons:

- it is empty;
- it refuses the request: it begins with an apology of the writer, or speaks of an AI;
- it holds Markdown, a title, or remarks on the story itself;
- it has fewer than 50 or more than 800 words: half and twice what stories of 100 to 400 words have;
- it is not English: fewer than 97 % of its letters are ASCII, or fewer than 20 % of its words are among the most common
  words of English stories (measured: all of 4,045 stories of TinyStories have at least 34 %);
- it is a near-duplicate of an earlier story, see `near_duplicates`;
- it shares a run of words with held-out text, see `overlap`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from trainer_service.text.near_duplicates import HASHES, RUN_WORDS, MinHash, near_duplicates
from trainer_service.text.overlap import HeldOutRuns
from trainer_service.text.word_grams import WordGrams, words_of

# Raise it when the same stories and held-out text give other kept stories.
VERSION = 1

LEAST_WORDS, MOST_WORDS = 50, 800
LEAST_ASCII_LETTERS = 0.97
LEAST_COMMON_WORDS = 0.2
_COMMON_WORDS = frozenset(
    words_of(
        "a about all an and are as at back be but by came could day did do down for from go had happy has have he her "
        "him his i in into is it like little made me my not of on one out play said saw she so that the their them "
        "then there they this to up very want wanted was we went were what when who will with would you your"
    )
)

# An apology of the writer comes first; a character may say the same later.
_REFUSAL = re.compile(
    r"""\W*(?:
        (?:i'm|i\ am|we're|we\ are)\s+(?:very\s+|so\s+|really\s+)?sorry\b[\s,.;:]*(?:but\s+)?(?:i|we)\b
        | sorry\b[\s,.;:]*(?:but\s+)?(?:i|we)\s+(?:can't|cannot|can\ not|am\ unable|'m\ unable|won't)
        | (?:i|we)\s+(?:can't|cannot|can\ not|won't|am\ unable\ to|'m\ unable\ to|will\ not)\s+
          (?:help|assist|write|create|comply|continue|provide|fulfill|generate|produce|do\ that)
        | i\s+apologi[sz]e\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_AI = re.compile(r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b", re.IGNORECASE)
_MARKDOWN = re.compile(
    r"""^[ \t]*(?:
        \#{1,6}\s | [-*+•]\s | \d{1,2}[.)]\s | >\s | \|          # headings, lists, quotations, tables
        | ``` | ~~~ | (?:[-*_=][ \t]*){3,}$                        # code fences, rules
        | (?:title|story|moral|note|summary|author|word\ count|words?|features?)\s*:
    )
    | \*\*|__|`|(?<!\w)\*\w[^*\n]*\*(?!\w)                         # emphasis, code
    | \(?word\ count\b
    | \b(?:this|the)\s+(?:short\s+)?story\s+(?:includes|features|uses|contains|incorporates)\b""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_REMARK = re.compile(
    r"\W*(?:(?:sure|certainly|of course|absolutely|okay)\W+)?(?:here(?:'s| is| are)|below is)\b"
    r"[^.\n]{0,80}\b(?:story|tale)",
    re.IGNORECASE,
)
_TITLE_WORDS = 12
_SENTENCE_ENDS = ".!?…:;,\"'”’)—-"  # noqa: RUF001


class Reason(StrEnum):
    """Why a story is dropped, in the words that follow a number."""

    EMPTY = "empty"
    REFUSAL = "refusing"
    MARKDOWN = "with Markdown, titles or remarks"
    SHORT = "too short"
    LONG = "too long"
    LANGUAGE = "not English"
    DUPLICATE = "near-duplicate"
    OVERLAP = "with runs of held-out text"


@dataclass(frozen=True)
class Filtered:
    """The places of the stories that are kept, in their order, and how many were dropped for each reason."""

    kept: tuple[int, ...]
    dropped: Mapping[Reason, int]


def how_many(name: str, total: int, dropped: Mapping[Reason, int]) -> str:
    """Says how many of all stories of a set are used, and why the others are not, the most frequent reason first."""
    reasons = sorted((-count, reason) for reason, count in dropped.items() if count)
    if not reasons:
        return f"All {total:,} stories of {name} are used."
    used = total - sum(dropped.values())
    listed = ", ".join(f"{-count:,} {reason}" for count, reason in reasons)
    subject = f"{used:,} are" if used > 1 else f"{used or 'none'} is"
    return f"Of {total:,} stories of {name}, {subject} used: {listed}."


def filter_texts(
    texts: Sequence[str], held_out: Iterable[str] = (), tick: Callable[[], object] = lambda: None
) -> Filtered:
    """Filters stories; of near-duplicates the first stays. `tick` is called many times a second.

    Whether a story is kept depends on no later story, so that a set which grows keeps what it kept before.
    """
    reasons: list[Reason | None] = [None] * len(texts)
    hashing, grams = MinHash(), WordGrams()
    runs = HeldOutRuns(held_out, grams, tick)
    signatures, places, overlapping = [], list[int](), set[int]()
    for place, text in enumerate(texts):
        words = words_of(text)
        reasons[place] = _reason(text, words)
        if reasons[place] is None:
            signatures.append(hashing.signature(grams.of(words, RUN_WORDS)))
            places.append(place)
            if runs.overlap(words):
                overlapping.add(place)
        tick()
    stacked = np.array(signatures, dtype=np.uint32).reshape(-1, HASHES)  # (N, K)
    for place, duplicate in zip(places, near_duplicates(stacked, tick), strict=True):
        if duplicate:
            reasons[place] = Reason.DUPLICATE
        elif place in overlapping:
            reasons[place] = Reason.OVERLAP
    kept = tuple(place for place, reason in enumerate(reasons) if reason is None)
    return Filtered(kept, Counter(reason for reason in reasons if reason is not None))


def _reason(text: str, words: Sequence[str]) -> Reason | None:
    """Returns why a story is dropped, as far as it follows from the story alone."""
    plain = text.replace("’", "'").strip()  # noqa: RUF001
    checks = (
        (Reason.EMPTY, lambda: not words),
        (Reason.REFUSAL, lambda: _REFUSAL.match(plain) or _AI.search(plain)),
        (Reason.MARKDOWN, lambda: _MARKDOWN.search(plain) or _REMARK.match(plain) or _has_title(plain)),
        (Reason.SHORT, lambda: len(words) < LEAST_WORDS),
        (Reason.LONG, lambda: len(words) > MOST_WORDS),
        (Reason.LANGUAGE, lambda: not _is_english(plain, words)),
    )
    return next((reason for reason, applies in checks if applies()), None)


def _has_title(text: str) -> bool:
    first, _, rest = text.partition("\n")
    return bool(rest) and len(first.split()) <= _TITLE_WORDS and first.rstrip()[-1] not in _SENTENCE_ENDS


def _is_english(text: str, words: Sequence[str]) -> bool:
    if sum(word in _COMMON_WORDS for word in words) < LEAST_COMMON_WORDS * len(words):
        return False
    if text.isascii():
        return True
    letters = [character.isascii() for character in text if character.isalpha()]
    return sum(letters) >= LEAST_ASCII_LETTERS * len(letters)
