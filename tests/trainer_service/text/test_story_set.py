from pathlib import Path

import pytest

from shared.errors import DataError, NotFound
from tests.trainer_service.story_sets import add_stories
from trainer_service.distillation.ledger import Ledger
from trainer_service.text.story_set import read_story_set


def test_a_set_holds_its_stories_in_the_order_of_their_answers(tmp_path: Path) -> None:
    add_stories(tmp_path, [" One. \n", "Half \ud800 a letter."])
    given = read_story_set(tmp_path, "bedtime")
    assert (given.name, given.texts, given.is_whole) == ("teacher:bedtime", ["One.", "Half � a letter."], True)
    assert all(story.prompt.startswith("Words: ") for story in given.stories)


def test_a_set_that_has_grown_begins_with_the_same_stories(tmp_path: Path) -> None:
    add_stories(tmp_path, ["One.", "Two."])
    before = read_story_set(tmp_path, "bedtime")
    add_stories(tmp_path, ["Three."])
    first = read_story_set(tmp_path, "bedtime", 2)
    assert (first.stories, first.is_whole) == (before.stories, False)
    assert read_story_set(tmp_path, "bedtime").texts == ["One.", "Two.", "Three."]


def test_an_unknown_set_and_one_without_stories_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no set of stories 'noon'"):
        read_story_set(tmp_path, "noon")
    with Ledger(tmp_path / "stories" / "bedtime"):
        pass
    with pytest.raises(DataError, match="teacher:bedtime holds no story yet"):
        read_story_set(tmp_path, "bedtime")
