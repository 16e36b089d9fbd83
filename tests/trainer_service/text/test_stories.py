import re
from collections import Counter

import pytest

from shared.gpt.tokenizer import train_bpe
from trainer_service.presets import PRESETS
from trainer_service.text.stories import generate_stories, plots, train_stories, validation_stories

pytestmark = pytest.mark.slow

STORIES = list(generate_stories(7, range(2000)))


def test_a_story_depends_only_on_the_seed_and_the_index() -> None:
    assert list(generate_stories(7, range(30, 40))) == STORIES[30:40]
    assert next(generate_stories(8, range(1))) != STORIES[0]


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(train_stories())


def test_no_story_occurs_twice_in_both_splits(train: list[str]) -> None:
    validation = list(validation_stories())
    assert (len(train), len(validation)) == (12_000, 600)
    assert len({*train, *validation}) == 12_600


def test_stories_are_short_and_simple() -> None:
    lengths = [len(story.split()) for story in STORIES]
    assert min(lengths) >= 60
    assert max(lengths) <= 220
    words = Counter(word for story in STORIES for word in re.findall(r"[a-z]+", story.lower()))
    assert 600 <= sum(count > 10 for count in words.values()) <= 1200


def test_the_stories_fill_the_vocabulary_of_every_preset(train: list[str]) -> None:
    sizes = [preset.vocabulary_size for preset in PRESETS.values() if preset.tokenizer == "bpe"]
    assert train_bpe(train, max(sizes)).vocabulary_size == max(sizes)


def test_every_choice_and_field_is_filled() -> None:
    assert not [story for story in STORIES if re.search(r"[\[\]{}|]", story)]


def test_articles_match_the_words_that_follow() -> None:
    text = "\n".join(STORIES)
    assert not re.findall(r"\b[Aa] [aeiou]\w*", text)
    assert not re.findall(r"\b[Aa]n (?!hour)[^aeiou\W]\w*", text)
    assert re.search(r"\ban (old|orange|otter|empty)\b", text)


def test_sentences_start_with_capitals_and_end_with_marks() -> None:
    for story in STORIES:
        for paragraph in story.split("\n"):
            assert re.match(r'"?[A-Z]', paragraph)
            assert re.search(r'[.!?]"?$', paragraph)
            assert not re.search(r'[.!?] "?[a-z]|  | [.,!?]|[.!?][.!?]', paragraph)
            assert paragraph.count('"') % 2 == 0


def test_a_speaker_or_a_new_sentence_follows_a_quotation() -> None:
    after = {word for story in STORIES for word in re.findall(r'[.,!?]" ([a-z]+)', story)}
    assert after <= {"he", "she", "it", "said", "asked", "called", "shouted", "someone"}


def test_nobody_is_their_own_friend() -> None:
    for story in STORIES:
        names = re.findall(r"(\w+), an? (?:little|small|young) ", story)
        hero = re.search(r"named (\w+)|name was (\w+)|^(\w+) was", story)
        assert hero
        assert not {name for name in hero.groups() if name} & set(names)


def test_every_plot_occurs() -> None:
    # For each plot, words that no other plot has.
    signs = ["favorite toy", "was free!", "wanted to eat it all", "to rain", "lying in bed", "to learn"]
    signs += ["hit the table", "seed", "next door", "into the woods", "had a birthday", " race ", "pocket"]
    signs += ["It was winter"]
    assert len(signs) == len(plots())
    for sign in signs:
        assert sum(sign in story for story in STORIES) > len(STORIES) / len(plots()) / 2
