"""The stories of a large teacher as a data set, `teacher:<name>`: what the ledger of the set holds."""

from dataclasses import dataclass
from pathlib import Path

from shared.errors import DataError
from trainer_service.distillation.ledger import Story, read_stories, stories_folder
from trainer_service.text.documents import whole


@dataclass(frozen=True)
class StorySet:
    """The first stories of a set, in the order of their answers; `name` is that of the data set.

    `is_whole` says whether these are all of them.
    """

    name: str
    stories: tuple[Story, ...]
    is_whole: bool

    @property
    def texts(self) -> list[str]:
        """The texts of the stories."""
        return [story.text for story in self.stories]


def read_story_set(directory: Path, name: str, count: int | None = None) -> StorySet:
    """Reads the set `teacher:<name>` below the folder of data: its first `count` stories, or all of them.

    A set only grows, so its first stories stay the same. Raises `NotFound` if there is no such set, and `DataError` if
    it has no story.
    """
    dataset = f"teacher:{name}"
    stories = read_stories(stories_folder(directory, name))
    if not stories:
        raise DataError(f"{dataset} holds no story yet: no call to the teacher has been answered.")
    first = tuple(Story(each.key, whole(each.prompt), whole(each.text).strip()) for each in stories[:count])
    return StorySet(dataset, first, is_whole=len(first) == len(stories))
