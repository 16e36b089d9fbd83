import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.errors import DataError
from shared.gpt.tokenizer import Tokenizer, train_bpe
from tests.trainer_service.story_sets import add_stories
from trainer_service.text import teacher_text, token_cache
from trainer_service.text.corpus import Corpus, DatasetSpec, open_corpus
from trainer_service.text.filters import Filtered, filter_texts
from trainer_service.text.stories import generate_stories
from trainer_service.text.story_set import StorySet, read_story_set
from trainer_service.text.teacher_text import SEPARATOR, PreparedStories, prepare_stories

STORIES = list(generate_stories(5, range(30)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(STORIES, 400)


@pytest.fixture
def given(tmp_path: Path) -> StorySet:
    add_stories(tmp_path, [*STORIES, "Too short.", STORIES[3]])
    return read_story_set(tmp_path, "bedtime")


def corpus(folder: Path, held_out: str = "Nothing of it.") -> Corpus:
    (folder / "other.txt").write_text("Some other text.")
    (folder / "held-out.txt").write_text(held_out)
    return open_corpus(DatasetSpec((str(folder / "other.txt"),), (str(folder / "held-out.txt"),)), 0.5)


def prepare(
    folder: Path, given: StorySet, tokenizer: Tokenizer, prompts: bool = False, text: Corpus | None = None
) -> PreparedStories:
    return prepare_stories(given, text or corpus(folder), tokenizer, prompts, folder / "shards", lambda: None)


def documents(prepared: PreparedStories, tokenizer: Tokenizer) -> list[np.ndarray]:
    ends = np.flatnonzero(prepared.text.tokens == tokenizer.end_token)
    parts = np.split(np.array(prepared.text.tokens), ends + 1)
    assert parts.pop().size == 0
    return parts


def test_each_story_that_passes_ends_in_the_end_token(tmp_path: Path, given: StorySet, tokenizer: Tokenizer) -> None:
    prepared = prepare(tmp_path, given, tokenizer)
    assert [tokenizer.decode(part.tolist()) for part in documents(prepared, tokenizer)] == STORIES
    assert prepared.text.counted is None
    assert prepared.notice == "Of 32 stories of teacher:bedtime, 30 are used: 1 near-duplicate, 1 too short."


def test_exactly_the_tokens_of_prompts_do_not_count(tmp_path: Path, given: StorySet, tokenizer: Tokenizer) -> None:
    prepared = prepare(tmp_path, given, tokenizer, prompts=True)
    counted = prepared.text.counted
    assert counted is not None and counted.dtype == np.bool_ and counted.size == prepared.text.tokens.size
    place = 0
    for story, part in zip(given.stories, documents(prepared, tokenizer), strict=False):
        prompt, text = tokenizer.encode(story.prompt + SEPARATOR), tokenizer.encode(story.text)
        assert part.tolist() == [*prompt, *text, tokenizer.end_token]
        assert counted[place : place + part.size].tolist() == [False] * len(prompt) + [True] * (len(text) + 1)
        place += part.size
    assert place == counted.size


def test_a_story_without_a_prompt_counts_whole(tmp_path: Path, given: StorySet, tokenizer: Tokenizer) -> None:
    bare = StorySet(given.name, tuple(type(each)(each.key, "", each.text) for each in given.stories), True)
    prepared = prepare(tmp_path, bare, tokenizer, prompts=True)
    assert prepared.text.counted is not None and prepared.text.counted.all()
    assert np.array_equal(prepared.text.tokens, prepare(tmp_path, given, tokenizer).text.tokens)


def test_a_story_that_overlaps_with_the_held_out_text_is_left_out(
    tmp_path: Path, given: StorySet, tokenizer: Tokenizer
) -> None:
    # What was prepared for another held-out text is not used.
    prepare(tmp_path, given, tokenizer)
    held_out = f"It began. {STORIES[7].upper()}"
    prepared = prepare(tmp_path, given, tokenizer, text=corpus(tmp_path, held_out))
    left = [tokenizer.decode(part.tolist()) for part in documents(prepared, tokenizer)]
    assert STORIES[7] not in left and "with runs of held-out text" in prepared.notice
    # Stories of a generator have sentences in common.
    assert len(left) > 20


def test_what_was_prepared_is_used_again_and_repaired_if_it_is_damaged(
    tmp_path: Path, given: StorySet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(texts: list[str], held_out: Iterator[str], tick: Callable[[], None]) -> Filtered:
        calls.append(texts)
        return filter_texts(texts, held_out, tick)

    monkeypatch.setattr(teacher_text, "filter_texts", count)
    first = prepare(tmp_path, given, tokenizer, prompts=True)
    tokens = np.array(first.text.tokens)
    for name in ("teacher.bin", "counted.bin", "filtered.json"):
        again = prepare(tmp_path, given, tokenizer, prompts=True)
        assert (again.digest, again.notice) == (first.digest, first.notice)
        assert np.array_equal(again.text.tokens, tokens)
        assert np.array_equal(again.text.counted, first.text.counted)  # type: ignore[arg-type]
        (path,) = (tmp_path / "shards").rglob(name)
        path.write_bytes(path.read_bytes()[:-3])
    prepare(tmp_path, given, tokenizer, prompts=True)
    assert len(calls) == 4


def test_what_a_run_has_used_within_a_month_stays(tmp_path: Path, given: StorySet, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, given, tokenizer)
    (folder,) = (tmp_path / "shards").iterdir()
    long_ago_s = folder.stat().st_mtime - token_cache.UNUSED_S - 100
    os.utime(folder, (long_ago_s, long_ago_s))
    prepare(tmp_path, given, tokenizer)
    token_cache.remove_unused(tmp_path / "shards")
    assert (folder / "teacher.bin").exists()


def test_the_digest_is_that_of_the_kept_text(tmp_path: Path, given: StorySet, tokenizer: Tokenizer) -> None:
    digest = prepare(tmp_path, given, tokenizer).digest
    assert prepare(tmp_path, given, tokenizer, prompts=True).digest != digest
    add_stories(tmp_path, ["Too short as well."])
    assert prepare(tmp_path, read_story_set(tmp_path, "bedtime"), tokenizer).digest == digest
    add_stories(tmp_path, list(generate_stories(6, range(1))))
    assert prepare(tmp_path, read_story_set(tmp_path, "bedtime"), tokenizer).digest != digest
    assert prepare(tmp_path, read_story_set(tmp_path, "bedtime", 32), tokenizer).digest == digest


def test_stories_that_all_fall_to_filters_are_an_error_with_the_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    add_stories(tmp_path, ["Too short.", "# A walk"])
    with pytest.raises(DataError, match=r"Of 2 stories of teacher:bedtime, none is used: .*1 too short"):
        prepare(tmp_path, read_story_set(tmp_path, "bedtime"), tokenizer)
    assert not list(tmp_path.rglob("*.bin"))


def test_an_end_leaves_no_partial_file(tmp_path: Path, given: StorySet, tokenizer: Tokenizer) -> None:
    class Ended(Exception):
        pass

    left = 3

    def tick() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Ended

    with pytest.raises(Ended):
        prepare_stories(given, corpus(tmp_path), tokenizer, True, tmp_path / "shards", tick)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.partial"))
