import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from trainer_service.text.filters import LEAST_WORDS, MOST_WORDS, Reason, filter_texts, how_many
from trainer_service.text.stories import generate_stories

# Each is a plain story that passes.
STORIES = list(generate_stories(11, range(8)))
STORY = STORIES[0]
GERMAN = (
    "Es war einmal ein kleiner Hund, der wollte immer spielen. Er lief in den Wald und sah dort einen Vogel. Der Vogel "
    "sang ein Lied, und der Hund hörte ihm zu. Dann gingen sie zusammen zum See und tranken Wasser. Am Abend kam der "
    "Hund nach Hause und schlief ein. Die Mutter deckte ihn zu und sagte gute Nacht. Alle waren froh."
)


def reasons(*texts: str, held_out: tuple[str, ...] = ()) -> dict[Reason, int]:
    return dict(filter_texts(texts, held_out).dropped)


def test_stories_that_are_plain_stories_are_kept_in_their_order() -> None:
    filtered = filter_texts(STORIES)
    assert filtered.kept == tuple(range(8)) and filtered.dropped == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.EMPTY),
        (" \n\n ", Reason.EMPTY),
        ("… !", Reason.EMPTY),
        (f"I'm sorry, but I can't write that story. {STORY}", Reason.REFUSAL),
        (f"I’m sorry, I cannot help with that. {STORY}", Reason.REFUSAL),  # noqa: RUF001
        (f"Sorry, but I can't do that. {STORY}", Reason.REFUSAL),
        (f"I can't help with this request. {STORY}", Reason.REFUSAL),
        (f"I apologize for this. {STORY}", Reason.REFUSAL),
        (f"{STORY} As an AI, I hope that you liked it.", Reason.REFUSAL),
        (f"{STORY} As a large language model I made it up.", Reason.REFUSAL),
        (f"# A walk\n{STORY}", Reason.MARKDOWN),
        (f"{STORY}\n- one\n- two", Reason.MARKDOWN),
        (f"{STORY}\n2. two", Reason.MARKDOWN),
        (f"```\n{STORY}\n```", Reason.MARKDOWN),
        (f"{STORY}\n---\n{STORY}", Reason.MARKDOWN),
        (f"**{STORY}**", Reason.MARKDOWN),
        (f"{STORY} It was *very* good.", Reason.MARKDOWN),
        (f"Title: A walk. {STORY}", Reason.MARKDOWN),
        (f"The Lost Kite\n\n{STORY}", Reason.MARKDOWN),
        (f"Here is a short story for you: {STORY}", Reason.MARKDOWN),
        (f"Sure! Here's a story. {STORY}", Reason.MARKDOWN),
        (f"{STORY}\n(Word count: 120)", Reason.MARKDOWN),
        (f"{STORY} This story uses the word dog.", Reason.MARKDOWN),
        ("The dog ran to the park and was happy. " * 5, Reason.SHORT),
        (GERMAN, Reason.LANGUAGE),
        ("мама мыла раму " * 30, Reason.LANGUAGE),
        ("the dog and the cat ran up " * 9 + "собака и кошка " * 5, Reason.LANGUAGE),
    ],
)
def test_each_filter_drops_what_it_is_for(text: str, reason: Reason) -> None:
    assert reasons(text) == {reason: 1}


@pytest.mark.parametrize(
    "text",
    [
        f'"I\'m sorry," said Tom. "I can\'t come." {STORY}',
        f"{STORY} She said, “I'm sorry, but I can't stay.”",
        f"{STORY} Zoë and José ate crème brûlée.",
        f"Ben ran fast.\n\n{STORY}",
        f"{STORY}\n\nThe end.",
        f"{STORY} Here is the story's lesson for all of us - be kind.",
        f"The story of the kite was known to 3 people. {STORY}",
    ],
)
def test_a_story_that_only_resembles_one_of_these_stays(text: str) -> None:
    assert reasons(text) == {}


def counted(words: int) -> str:
    """Returns a story of a number of words, in which no run of words repeats."""
    names: Iterator[int] = count()
    parts = (f"The dog saw number{next(names)} and it was happy.".split() for _ in count())
    return " ".join([word for _, part in zip(range(words), parts, strict=False) for word in part][:words])


def test_the_length_counts_in_words() -> None:
    assert reasons(counted(LEAST_WORDS)) == {} == reasons(counted(MOST_WORDS))
    assert reasons(counted(LEAST_WORDS - 1)) == {Reason.SHORT: 1}
    assert reasons(counted(MOST_WORDS + 1)) == {Reason.LONG: 1}


def test_the_first_of_near_duplicates_stays() -> None:
    changed = STORY.replace(STORY.split()[40], "somewhere")
    assert changed != STORY
    filtered = filter_texts([STORIES[1], STORY, changed, STORIES[2], STORIES[1]])
    assert filtered.kept == (0, 1, 3) and filtered.dropped == {Reason.DUPLICATE: 2}


def test_a_story_with_a_run_of_held_out_words_is_dropped() -> None:
    held_out = "It was said that " + " ".join(STORY.upper().split()[10:25]) + " and no more"
    filtered = filter_texts(STORIES, [held_out, "another text"])
    assert filtered.kept == tuple(range(1, 8)) and filtered.dropped == {Reason.OVERLAP: 1}


def test_a_story_is_counted_once_and_later_stories_change_nothing() -> None:
    texts = [*STORIES, "", *STORIES[:3], f"# A walk\n{STORY}", "Too short."]
    whole = filter_texts(texts)
    assert len(whole.kept) + sum(whole.dropped.values()) == len(texts)
    for first in range(len(texts)):
        assert filter_texts(texts[:first]).kept == tuple(place for place in whole.kept if place < first)


def test_the_sentence_names_the_most_frequent_reason_first() -> None:
    dropped = {Reason.SHORT: 40, Reason.DUPLICATE: 61, Reason.LONG: 0, Reason.EMPTY: 1}
    assert how_many("teacher:a", 2000, dropped) == (
        "Of 2,000 stories of teacher:a, 1,898 are used: 61 near-duplicate, 40 too short, 1 empty."
    )
    assert how_many("teacher:a", 2, {Reason.SHORT: 1}) == "Of 2 stories of teacher:a, 1 is used: 1 too short."
    assert how_many("teacher:a", 2, {Reason.SHORT: 2}) == "Of 2 stories of teacher:a, none is used: 2 too short."
    assert how_many("teacher:a", 2000, {}) == "All 2,000 stories of teacher:a are used."


def test_filtering_can_be_ended_at_any_story() -> None:
    class Ended(Exception):
        pass

    calls = iter(range(4))

    def tick() -> None:
        if next(calls) == 3:
            raise Ended

    with pytest.raises(Ended):
        filter_texts(STORIES, (), tick)


@pytest.mark.skipif("GPTLOOP_TEST_DATA" not in os.environ, reason="needs real stories")
def test_real_stories_pass() -> None:
    path = Path(os.environ["GPTLOOP_TEST_DATA"]) / "tinystories" / "train-v1.txt"
    stories = [story.strip() for story in path.read_text(encoding="utf-8").split("<|endoftext|>")][1:-1]
    filtered = filter_texts(stories[:500])
    assert len(filtered.kept) > 490
