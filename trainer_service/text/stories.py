"""The built-in data set: small English stories from a deterministic generator, so that no network is needed."""

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

# Part of the revision of the data: raise it when the same seed and index give another story.
GENERATOR_VERSION = 2
SEED = 2024
TRAIN_STORIES = 12_000
VALIDATION_STORIES = 600
# The share of stories with a detail beside the plot. It is small, so that a small model learns the plots first.
DETAIL_SHARE = 0.15

_MARKS = re.compile(r"[\[|\]]|[^\[|\]]+")
_SENTENCE_START = re.compile(r'(^"?|[.!?] "?)([a-z])')
_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")

Sequence: TypeAlias = "list[str | list[Sequence]]"


@dataclass(frozen=True)
class Character:
    """A person or an animal in a story. Its text is the name; its fields give the pronouns."""

    name: str
    noun: str
    kind: str
    he: str

    def __str__(self) -> str:
        return self.name

    @property
    def a_kind(self) -> str:
        """The words that introduce it: "a small fox"."""
        return f"a {self.kind}"

    @property
    def him(self) -> str:
        """The object pronoun."""
        return {"he": "him", "she": "her", "it": "it"}[self.he]

    @property
    def his(self) -> str:
        """The possessive pronoun."""
        return {"he": "his", "she": "her", "it": "its"}[self.he]

    @property
    def himself(self) -> str:
        """The reflexive pronoun."""
        return f"{self.him}self"

    @property
    def He(self) -> str:  # noqa: N802 - spelt as it stands in the story
        """The subject pronoun at the start of a sentence after a quotation."""
        return self.he.capitalize()


@dataclass(frozen=True)
class Thing:
    """An object with its colour."""

    colour: str
    noun: str

    def __str__(self) -> str:
        return f"{self.colour} {self.noun}"

    @property
    def a_kind(self) -> str:
        """The words that introduce it: "a red ball"."""
        return f"a {self}"


@dataclass(frozen=True)
class Place:
    """The place of a story, as a direction and as a location."""

    to: str
    at: str


def train_stories() -> Iterator[str]:
    """Yields the training split."""
    return generate_stories(SEED, range(TRAIN_STORIES))


def validation_stories() -> Iterator[str]:
    """Yields the held-out split: the indices after the training split."""
    return generate_stories(SEED, range(TRAIN_STORIES, TRAIN_STORIES + VALIDATION_STORIES))


def generate_stories(seed: int, indices: range) -> Iterator[str]:
    """Yields a story for each index; a story is a pure function of the seed and the index."""
    for index in indices:
        yield generate_story(random.Random(f"{seed}:{index}"))


def generate_story(rng: random.Random) -> str:
    """Returns a story of 60 to 220 words in three paragraphs."""
    plot = rng.choice(plots())
    middle = len(plot) // 2
    beginning = [rng.choice(_lines("openings")), rng.choice(_lines("traits"))]
    if rng.random() < DETAIL_SHARE:
        beginning.append(rng.choice(_lines("details")))
    paragraphs = [beginning, plot[:middle], plot[middle:]]
    fills = _fills(rng)
    return "\n".join(" ".join(filter(None, (_tell(beat, fills, rng) for beat in beats))) for beats in paragraphs)


@cache
def plots() -> list[list[str]]:
    """Returns the beats of each plot."""
    return [beats.splitlines() for beats in _material()["plots"].values()]


@cache
def _material() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@cache
def _lines(name: str) -> list[str]:
    return str(_material()[name]).splitlines()


@cache
def _words(name: str) -> list[str]:
    return str(_material()[name]).split()


def _tell(beat: str, fills: dict[str, object], rng: random.Random) -> str:
    """Makes the choices of a beat, fills its fields, and corrects articles and capitals."""
    text = " ".join("".join(_choose(_parse(beat), rng)).format_map(fills).split())
    text = _BEFORE_VOWEL.sub(r"\1n ", text)
    return _SENTENCE_START.sub(lambda start: start[1] + start[2].upper(), text)


def _choose(sequence: Sequence, rng: random.Random) -> Iterator[str]:
    for part in sequence:
        if isinstance(part, str):
            yield part
        else:
            yield from _choose(part[int(rng.random() * len(part))], rng)


@cache
def _parse(beat: str) -> Sequence:
    """Parses a beat into text and choices: "a [b|c]" becomes `["a ", [["b"], ["c"]]]`."""
    sequences: list[Sequence] = [[]]
    choices: list[list[Sequence]] = []
    for mark in _MARKS.findall(beat):
        if mark == "[":
            choices.append([])
            sequences.append([])
        elif mark in "|]":
            choices[-1].append(sequences.pop())
            if mark == "|":
                sequences.append([])
            else:
                sequences[-1].append(choices.pop())
        else:
            sequences[-1].append(mark)
    return sequences[0]


def _fills(rng: random.Random) -> dict[str, object]:
    """Draws the characters, things and places of a story; no two are alike."""
    species = rng.sample(_words("animals"), 2)
    hero, friend = (_character(name, animal, rng) for name, animal in zip(_names(rng), species, strict=True))
    role, pronoun = rng.choice(_material()["family"])
    wise, small = rng.choice(_words("wise")), rng.choice(_words("small_animals"))
    colours, nouns = rng.sample(_words("colours"), 3), rng.sample(_words("things"), 2)
    first_spot, second_spot, third_spot = rng.sample(_lines("spots"), 3)
    things = [f"a {thing}" for thing in rng.sample(_words("more_things"), 3)]
    return {
        "h": hero,
        "f": friend,
        "g": Character(f"{hero.his} {role}", role, role, pronoun),
        "w": Character(f"the {wise}", wise, f"old {wise}", rng.choice(["he", "she"])),
        "x": Character(f"the {small}", small, f"tiny {small}", "it"),
        "o": Thing(colours[0], nouns[0]),
        "o2": Thing(colours[1], nouns[1]),
        "c": colours[2],
        "p": Place(*rng.choice(_material()["places"])),
        "s": first_spot,
        "s2": second_spot,
        "s3": third_spot,
        "n": rng.choice(_words("more_names")),
        "t": things[0],
        "t2": things[1],
        "t3": things[2],
    }


def _names(rng: random.Random) -> list[str]:
    """Draws two different names; each is a girl's, a boy's or an animal's with equal probability."""
    groups = [rng.choice([_words("girls"), _words("boys"), _words("pets")]) for _ in range(2)]
    first = rng.choice(groups[0])
    return [first, rng.choice([name for name in groups[1] if name != first])]


def _character(name: str, species: str, rng: random.Random) -> Character:
    size = rng.choice(_words("sizes"))
    if name in _words("pets"):
        return Character(name, species, f"{size} {species}", rng.choice(["he", "she"]))
    noun, pronoun = ("girl", "she") if name in _words("girls") else ("boy", "he")
    return Character(name, noun, f"{size} {noun}", pronoun)
