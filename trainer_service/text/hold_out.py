"""Splits a text into training and held-out parts: holds out whole documents or the end of each document.

Documents that are added to over time, such as the stories of a set, are held out by their keys.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from trainer_service.text.documents import Passage

# Whole documents are held out if their characters differ from the share by at most this part of it.
TOLERANCE = 0.1
# The farthest that a cut moves to reach a boundary: in characters, and as a part of the shorter side of the cut.
_WINDOW_CHARACTERS = 2000
_WINDOW_SHARE = 0.1
# Boundaries in order of preference; the cut is at the end of a match.
_BOUNDARIES = [
    re.compile(pattern)
    for pattern in (
        r"\n\n+",
        r"\n",
        r"[.!?][\"'”’)\]]*(?=\s)|[。！？][”’」』）]*",  # noqa: RUF001
        r"(?=\s)",
    )
]

Split = Callable[[bool], Iterator[Passage]]


def is_held_out(key: str, share: float) -> bool:
    """Returns whether a document with this key is held out: of many documents about the share is.

    This depends on nothing else, so a document never changes sides while others are added.
    """
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def hold_out(read: Callable[[], Iterator[Passage]], lengths: np.ndarray, share: float) -> tuple[str, Split]:
    """Returns a sentence about what is held out, and a function that yields the held-out passages or the others.

    Each call of `read` yields all passages; `lengths` are the characters of their documents, (N,).
    """
    held = _documents(lengths, share)
    if held is not None:
        return (
            f"{share:.1%} of the text, {held.sum():,} of {held.size:,} documents, evenly spread, is held out for "
            "validation.",
            lambda held_out: _split_documents(read(), held, held_out),
        )
    cuts = _cuts(read(), lengths, share)
    few = "one document" if lengths.size == 1 else "documents that are too few or too unequal to hold out whole"
    return (
        f"The last {share:.1%} of each document is held out for validation: the text is {few}.",
        lambda held_out: _split_ends(read(), cuts, lengths, held_out),
    )


def _documents(lengths: np.ndarray, share: float) -> np.ndarray | None:
    """Returns which documents are held out, (N,), or None if whole documents cannot make up the share.

    The choice does not depend on a document's own length, so that held-out documents are like the others.
    """
    mean = lengths.mean()
    held = np.zeros(lengths.size, dtype=bool)  # (N,)
    total = held_out = 0
    for index, length in enumerate(lengths.tolist()):
        # With equal lengths and a share of 1/20, this takes the middle one of every 20.
        if share * (total + mean) - held_out >= mean * (0.5 - 1e-9):
            held[index] = True
            held_out += length
        total += length
    return held if abs(held_out - share * total) <= TOLERANCE * share * total else None


def _split_documents(passages: Iterable[Passage], held: np.ndarray, held_out: bool) -> Iterator[Passage]:
    index = 0
    for passage in passages:
        if held[index] == held_out:
            yield passage
        index += passage.ends_document


def _cuts(passages: Iterable[Passage], lengths: np.ndarray, share: float) -> list[int]:
    """Returns, for each document, where its held-out part starts; together these parts have the share of the text."""
    ends = np.floor(share * np.cumsum(lengths) + 1e-9).astype(np.int64)
    targets = lengths - np.diff(ends, prepend=0)  # (N,)
    cuts, window, position = list[int](), "", 0
    for passage in passages:
        length, target = int(lengths[len(cuts)]), int(targets[len(cuts)])
        half = min(_WINDOW_CHARACTERS, int(_WINDOW_SHARE * min(target, length - target)))
        first = target - half
        window += passage.text[max(first - position, 0) : max(target + half - position, 0)]
        position += len(passage.text)
        if passage.ends_document:
            cuts.append(first + _boundary(window, target - first))
            window, position = "", 0
    return cuts


def _boundary(window: str, target: int) -> int:
    """Returns the best boundary in a window of text: of the most preferred kind, the one nearest to the target."""
    for pattern in _BOUNDARIES:
        places = [match.end() for match in pattern.finditer(window)]
        if places:
            return min(places, key=lambda place: abs(place - target))
    while 0 < target < len(window) and unicodedata.category(window[target])[0] == "M":
        target += 1  # a combining mark belongs to the letter before it
    return target


def _split_ends(passages: Iterable[Passage], cuts: list[int], lengths: np.ndarray, held_out: bool) -> Iterator[Passage]:
    index, position = 0, 0
    for passage in passages:
        cut = cuts[index]
        at = min(max(cut - position, 0), len(passage.text))
        text = passage.text[at:] if held_out else passage.text[:at]
        has_part = cut < lengths[index] if held_out else cut > 0
        if has_part and (text or passage.ends_document):
            yield Passage(text, passage.ends_document)
        position += len(passage.text)
        if passage.ends_document:
            index, position = index + 1, 0
