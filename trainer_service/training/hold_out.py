"""Which part of a text is held out: whole documents or the end of each, as many characters as were asked for."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from trainer_service.training.documents import Passage

# Whole documents are held out if their characters are so near to the share, as a part of it; else the end of each is.
TOLERANCE = 0.1
# How far from its place a document is cut at most for the sake of a boundary: in characters, and as a part of its end.
_WINDOW_CHARACTERS = 2000
_WINDOW_SHARE = 0.1
# From the best boundary down; the cut is at the end of what matches.
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


def hold_out(read: Callable[[], Iterator[Passage]], lengths: np.ndarray, share: float) -> tuple[str, Split]:
    """A sentence that says what is held out, and the passages that are, or those that are not.

    `read` reads all passages from the first on, `lengths` are the characters of their documents, (N,).
    """
    held = _documents(lengths, share)
    if held is not None:
        return (
            f"{share:.1%} of the text, {held.sum():,} of {held.size:,} documents, evenly spread, is held out for "
            "validation.",
            lambda held_out: _split_documents(read(), held, held_out),
        )
    cuts = _cuts(read(), lengths, share)
    few = "it is one document" if lengths.size == 1 else "its documents are too few or too unequal to hold out whole"
    return (
        f"The last {share:.1%} of each document is held out for validation: {few}.",
        lambda held_out: _split_ends(read(), cuts, lengths, held_out),
    )


def _documents(lengths: np.ndarray, share: float) -> np.ndarray | None:
    """Which documents are held out, (N,), or None if the whole ones do not make up the share.

    A document's own length does not decide, so that those held out are like the others.
    """
    mean = lengths.mean()
    held = np.zeros(lengths.size, dtype=bool)  # (N,)
    total = held_out = 0
    for index, length in enumerate(lengths.tolist()):
        # So that with equal lengths and a share of 1/20 it is the middle one of every 20.
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
    """For each document the position from which on it is held out, near the share of all characters so far."""
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
    """The best boundary in a window of text, of several the one nearest to the target."""
    for pattern in _BOUNDARIES:
        places = [match.end() for match in pattern.finditer(window)]
        if places:
            return min(places, key=lambda place: abs(place - target))
    while 0 < target < len(window) and unicodedata.category(window[target])[0] == "M":
        target += 1  # a mark belongs to the letter before it
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
