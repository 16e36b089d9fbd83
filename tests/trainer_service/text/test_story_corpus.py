"""Stories of a large teacher as a data set: alone, and beside other text."""

from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DataError, InvalidArgument, NotFound
from tests.trainer_service.story_sets import add_stories
from tests.trainer_service.text.whole_documents import whole_documents
from trainer_service.dataset_names import expand
from trainer_service.distillation.ledger import Story
from trainer_service.presets import PRESETS
from trainer_service.text.corpus import Corpus, DatasetSpec, absolute, check_size, check_spec, open_corpus
from trainer_service.text.overlap import HeldOutRuns
from trainer_service.text.stories import generate_stories
from trainer_service.text.story_set import StorySet, read_story_set
from trainer_service.text.tokens import PreparedData, prepare
from trainer_service.text.word_grams import WordGrams, words_of

STORIES = list(generate_stories(5, range(80)))
BEDTIME = "teacher:bedtime"
CONFIG = replace(
    PRESETS["demo"], vocabulary_size=300, context_length=32, max_steps=10, batch_size=8, evaluation_windows=4
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_stories(tmp_path, [*STORIES, "Too short."])
    (tmp_path / "other.txt").write_text("<|endoftext|>".join(f"Tale {n} of the {n * n} foxes." for n in range(400)))
    (tmp_path / "held-out.txt").write_text(f"A text. {STORIES[4]}")
    return tmp_path


def alone(folder: Path, share: float = 0.1, validation: tuple[str, ...] = ()) -> Corpus:
    spec = DatasetSpec((BEDTIME,), validation)
    return open_corpus(spec, share, story_set=read_story_set(folder, "bedtime"))


def data(folder: Path, *names: str, stories: int | None = None, **values: object) -> PreparedData:
    config = replace(CONFIG, **values)  # type: ignore[arg-type]
    names = tuple(str(folder / name) if name.endswith(".txt") else name for name in names)
    return prepare(DatasetSpec(names), config, folder, lambda *_: None, stories=stories)


def test_names_of_sets_are_passed_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand([f"builtin {BEDTIME}"]) == ("builtin", BEDTIME) == expand(["builtin", BEDTIME])
    assert absolute(DatasetSpec((BEDTIME,))) == DatasetSpec((BEDTIME,))


def test_a_set_stands_alone_or_beside_any_other_data(folder: Path) -> None:
    other = str(folder / "other.txt")
    for spec in map(DatasetSpec, ((BEDTIME,), ("builtin", BEDTIME), (BEDTIME, "wikitext-103"), (other, BEDTIME))):
        check_spec(spec)
        check_size(spec, 32)
    with pytest.raises(DataError, match="The text holds"):
        check_size(DatasetSpec((BEDTIME, other)), 100_000)
    for names, sentence in (
        ((BEDTIME, "teacher:noon"), "'teacher:bedtime' and 'teacher:noon' are both stories of a teacher; name one set"),
        (("builtin", other, BEDTIME), "builtin cannot be combined with other data"),
        (("teacher:",), "'teacher:' names no set of stories"),
        (("teacher:../a",), r"'teacher:\.\./a' names no set"),
        (("teacher:.",), r"'teacher:\.' names no set"),
    ):
        with pytest.raises(InvalidArgument, match=sentence):
            check_spec(DatasetSpec(names))
    with pytest.raises(NotFound, match="The file 'teacher:bedtime' does not exist"):
        check_spec(DatasetSpec(("builtin",), (BEDTIME,)))


def test_alone_a_share_of_the_stories_is_held_out_and_no_run_of_words_is_in_both(folder: Path) -> None:
    corpus = alone(folder)
    train, held_out = whole_documents(corpus.train()), whole_documents(corpus.validation())
    assert 3 < len(held_out) < 15 and set(train) | set(held_out) <= set(STORIES) and not set(train) & set(held_out)
    runs = HeldOutRuns(held_out, WordGrams())
    assert not any(runs.overlap(words_of(text)) for text in train)
    assert not set(held_out) - set(whole_documents(alone(folder, 0.2).validation()))
    left_out = len(STORIES) - len(train) - len(held_out)
    assert left_out > 0  # stories of a generator have sentences in common
    counts, rule = corpus.notices
    used = f"Of 81 stories of {BEDTIME}, {80 - left_out} are used: "
    assert counts.startswith(used) and f"{left_out} with runs of held-out text" in counts and "1 too short" in counts
    assert rule == f"{len(held_out)} of 80 stories, chosen by their keys, are held out for validation."
    assert corpus.source == corpus.held_out_source == BEDTIME


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(10, 40), min_size=2, max_size=4),
    lengths=st.lists(st.integers(30, 200), min_size=40, max_size=40),
    share=st.floats(0.05, 0.5),
)
def test_alone_no_story_changes_sides_while_the_set_grows(sizes: list[int], lengths: list[int], share: float) -> None:
    phrases = (f"the {''.join(letters)}" for letters in product("abcdefgh", repeat=5))
    stories = [Story(f"key {n}", "", " ".join(islice(phrases, length))) for n, length in enumerate(lengths)]
    train, held_out = set[str](), set[str]()
    for size in sorted(sizes):
        story_set = StorySet(BEDTIME, tuple(stories[:size]), is_whole=True)
        corpus = open_corpus(DatasetSpec((BEDTIME,)), share, story_set=story_set)
        now_held_out = set(whole_documents(corpus.validation()))
        assert held_out <= now_held_out
        train, held_out = train | set(whole_documents(corpus.train())), now_held_out
        assert len(train | held_out) == size and not train & held_out


def test_alone_stories_that_are_all_held_out_are_an_error(tmp_path: Path) -> None:
    add_stories(tmp_path, STORIES[:1])
    with pytest.raises(DataError, match=r"All that are left are held out: ask for more stories\.$"):
        alone(tmp_path, 1 - 1e-12)


def test_alone_with_held_out_files_every_other_story_is_trained_on(folder: Path) -> None:
    corpus = alone(folder, validation=(str(folder / "held-out.txt"),))
    train = whole_documents(corpus.train())
    assert STORIES[4] not in train and len(train) > 60
    assert whole_documents(corpus.validation()) == [f"A text. {STORIES[4]}"]
    assert corpus.held_out_source == "held-out.txt"


def test_alone_the_revision_is_that_of_the_kept_text_and_its_split(folder: Path) -> None:
    revision = alone(folder).revision
    assert alone(folder).revision == revision != alone(folder, 0.2).revision
    add_stories(folder, ["Too short as well."])
    assert alone(folder).revision == revision
    add_stories(folder, list(generate_stories(6, range(1))))
    assert alone(folder).revision != revision


def test_alone_stories_that_all_fall_to_filters_are_an_error(tmp_path: Path) -> None:
    add_stories(tmp_path, ["Too short.", "And this."])
    with pytest.raises(DataError, match=r"Of 2 stories of teacher:bedtime, none is used: 2 too short\."):
        alone(tmp_path)


def test_beside_other_text_the_stories_change_neither_its_tokens_nor_the_tokenizer(folder: Path) -> None:
    plain, mixed = data(folder, "other.txt"), data(folder, "other.txt", BEDTIME)
    assert np.array_equal(plain.train, mixed.train) and np.array_equal(plain.validation, mixed.validation)
    assert plain.tokenizer.digest == mixed.tokenizer.digest
    assert (plain.teacher, plain.stories) == (None, None)
    assert mixed.teacher is not None and mixed.stories == 81
    assert mixed.tokenizer.decode(mixed.teacher.tokens[:60].tolist()) in STORIES[0]
    assert (mixed.source, mixed.held_out_source) == (f"other.txt, {BEDTIME}", "other.txt")
    assert mixed.revision.startswith(f"{plain.revision}+")
    assert f"Of 81 stories of {BEDTIME}, 80 are used: 1 too short." in mixed.notices


def test_alone_the_stories_are_ordinary_text(folder: Path) -> None:
    prepared = data(folder, BEDTIME)
    assert (prepared.teacher, prepared.stories) == (None, 81)
    assert prepared.tokenizer.decode(prepared.train[:60].tolist()) in "".join(STORIES)
    with pytest.raises(InvalidArgument, match="teacher_prompts needs other text beside teacher:bedtime"):
        data(folder, BEDTIME, teacher_prompts=True)


def test_the_first_stories_of_a_set_that_has_grown_give_the_same_tokens(folder: Path) -> None:
    before = data(folder, "other.txt", BEDTIME)
    add_stories(folder, list(generate_stories(6, range(40))))
    after, first = data(folder, "other.txt", BEDTIME), data(folder, "other.txt", BEDTIME, stories=81)
    assert before.teacher and after.teacher and first.teacher
    assert after.teacher.tokens.size > first.teacher.tokens.size and after.revision != before.revision
    assert np.array_equal(first.teacher.tokens, before.teacher.tokens) and first.revision == before.revision
    grown = f"{BEDTIME} has grown since the run was queued; the run reads the first 81 stories."
    assert grown in first.notices and grown not in (*before.notices, *after.notices)


def test_too_few_stories_for_a_window_are_an_error(folder: Path) -> None:
    add_stories(folder, [" ".join(STORIES[0].split()[:55])], "noon")
    with pytest.raises(DataError, match=r"training text of teacher:noon holds .* needs 513: ask for more stories"):
        data(folder, "other.txt", "teacher:noon", context_length=512, evaluation_windows=1, validation_share=0.3)
    with pytest.raises(NotFound, match="no set of stories 'dusk'"):
        data(folder, "other.txt", "teacher:dusk")
