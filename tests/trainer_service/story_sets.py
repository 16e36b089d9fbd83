"""Sets of a large teacher's stories, as the ledger of a job holds them."""

import random
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from trainer_service.distillation.answers import Answer, Usage
from trainer_service.distillation.ledger import Ledger, key_of, stories_folder
from trainer_service.distillation.prompts import draw_prompt

_THINGS = ["cloud", "spoon", "river", "drum", "lantern", "shell", "tower", "feather", "bucket", "pillow", "ladder"]
_DEEDS = ["hid", "found", "washed", "painted", "carried", "dropped", "followed", "counted", "fixed", "shared", "shook"]


def tales(first: int, count: int) -> list[str]:
    """Returns stories that pass the filters: no two are alike, and they have nothing in common with other text."""

    def sentence(draw: random.Random) -> str:
        (first, last), (one, other) = draw.sample(_DEEDS, 2), draw.sample(_THINGS, 2)
        return f"He {first} the {one} and then she {last} a {other}."

    def tale(number: int) -> str:
        draw = random.Random(number)
        return " ".join(sentence(draw) for _ in range(8))

    return [tale(number) for number in range(first, first + count)]


def add_stories(directory: Path, texts: Sequence[str], name: str = "bedtime") -> None:
    """Adds stories to the set of a name below the folder of data."""
    with Ledger(stories_folder(directory, name)) as ledger:
        first = ledger.account.answered
        for sample, text in enumerate(texts, first):
            key = key_of("m", "t", {}, sample)
            ledger.sent(key, sample, "m", "t", Decimal("0.0004"), vars(draw_prompt(sample)))
            ledger.answered(key, Decimal("0.0001"), Answer(text, Usage(100, 200, 50), "stop", "m", "fp"))
