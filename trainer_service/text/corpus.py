"""The text of a training run: the built-in stories, a data set of the Hugging Face hub, local files, or stories of a
large teacher."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np

from shared.errors import DataError, InvalidArgument, shown
from shared.registry.manifest import RUN_NAME
from shared.text import excerpt
from trainer_service.text import stories
from trainer_service.text.documents import Passage
from trainer_service.text.filters import Reason, filter_texts, how_many
from trainer_service.text.hold_out import hold_out, is_held_out
from trainer_service.text.hub import HUB, HubCorpus, HubDataset
from trainer_service.text.local_files import ENDINGS, TextFile, check_file, open_file, passes
from trainer_service.text.overlap import HeldOutRuns
from trainer_service.text.story_set import StorySet
from trainer_service.text.word_grams import WordGrams, words_of

BUILTIN = "builtin"
# The name of a set of a large teacher's stories follows it.
TEACHER = "teacher:"
# Part of every revision: raise it when the same content gives different documents or a different split.
READER_VERSION = 3

# Receives the number of bytes that were just read, and the number that the first reading takes in total.
OnRead = Callable[[int, int], None]


@dataclass(frozen=True)
class DatasetSpec:
    """The data that a user named: one data set or several local files, with or without stories of a large teacher, and
    local files to hold out, if any."""

    dataset: tuple[str, ...]
    validation: tuple[str, ...] = ()

    @property
    def story_set(self) -> str:
        """The name of the set of a teacher's stories, or nothing."""
        return next((name.removeprefix(TEACHER) for name in self.dataset if name.startswith(TEACHER)), "")

    @property
    def mixes_stories(self) -> bool:
        """Whether stories of a teacher are mixed with other text."""
        return self.without_mixed != self

    @property
    def without_mixed(self) -> "DatasetSpec":
        """The data without the stories that are mixed with other text: what the held-out text depends on."""
        text = tuple(name for name in self.dataset if not name.startswith(TEACHER))
        return replace(self, dataset=text or self.dataset)


@dataclass(frozen=True)
class Corpus:
    """Two disjoint streams of text; each call of `train` and `validation` starts at the first document.

    `source` and `held_out_source` name the text of each for display. `revision` identifies the content of both.
    `notices` are sentences for the user.
    """

    source: str
    held_out_source: str
    revision: str
    notices: tuple[str, ...]
    train: Callable[[], Iterator[Passage]]
    validation: Callable[[], Iterator[Passage]]


def is_named(name: str) -> bool:
    """Returns whether a name is that of a data set, not of a file."""
    return name == BUILTIN or name in HUB or name.startswith(TEACHER)


def check_spec(spec: DatasetSpec) -> None:
    """Checks names and files without reading text or using the network.

    Raises `InvalidArgument` for a wrong name, `NotFound` for a missing file and `DataError` for an unreadable one.
    """
    if not spec.dataset:
        raise InvalidArgument(f"No data set is given. {_accepted()}")
    _check_files(spec)


def _check_files(spec: DatasetSpec) -> None:
    sets = [name for name in spec.dataset if name.startswith(TEACHER)]
    if len(sets) > 1:
        raise InvalidArgument(f"{shown(sets[0])} and {shown(sets[1])} are both stories of a teacher; name one set.")
    if sets and not RUN_NAME.fullmatch(spec.story_set):
        raise InvalidArgument(
            f"{shown(sets[0])} names no set of stories; use {TEACHER} and a name, as in teacher:bedtime."
        )
    text = spec.without_mixed.dataset
    named = [name for name in text if is_named(name)]
    if named and len(text) > 1:
        raise InvalidArgument(
            f"{named[0]} cannot be combined with other data: only local files can be combined, and one set of a "
            "teacher's stories with other data."
        )
    files = () if named else text
    for name in files:
        if not Path(name).suffix and not os.path.exists(name):  # noqa: PTH110 - Path's raises on odd names
            raise InvalidArgument(f"Unknown data set {shown(name)}. {_accepted()}")
    files += spec.validation
    identities = [check_file(Path(name)) for name in files]
    # Compared by inode: a file can have several names.
    inodes = [(identity.device, identity.inode) for identity in identities]
    for name, inode in zip(files, inodes, strict=True):
        if inodes.count(inode) > 1:
            raise InvalidArgument(f"The file {shown(name)} is named twice; name each file once.")


def check_size(spec: DatasetSpec, context_length: int) -> None:
    """Raises `DataError` if the sizes of the files show that they hold too little text; reads none of them.

    Every token takes at least one byte, except the end tokens.
    """
    window = context_length + 1
    text = spec.without_mixed.dataset
    files = () if is_named(text[0]) else text
    for which, names, windows in (
        ("text", files, 1 if spec.validation else 2),
        ("held-out text", spec.validation, 1),
    ):
        # The size of a compressed file, as Parquet is too, does not bound its text.
        if not names or any(Path(name).suffix.lower() not in (".txt", ".jsonl") for name in names):
            continue
        size_bytes = sum(check_file(Path(name)).size_bytes for name in names)
        if size_bytes + windows * len(names) < windows * window:
            parts = "training and held-out text" if windows == 2 else "one window"
            raise DataError(
                f"The {which} holds {size_bytes:,} bytes, but {parts} of context_length {context_length} "
                f"{'need' if windows == 2 else 'needs'} at least {windows * window:,} tokens: add text, or set a "
                "smaller context_length."
            )


def absolute(spec: DatasetSpec) -> DatasetSpec:
    """Returns the same data with absolute paths, so that another process finds the files."""

    def resolve(name: str) -> str:
        return name if is_named(name) else str(Path(name).absolute())

    return DatasetSpec(tuple(map(resolve, spec.dataset)), tuple(map(resolve, spec.validation)))


def open_corpus(
    spec: DatasetSpec,
    validation_share: float,
    on_read: OnRead = lambda *_: None,
    story_set: StorySet | None = None,
) -> Corpus:
    """Opens the data, except stories that are mixed with other text; local files are read and checked from beginning to
    end. `story_set` is the set of a teacher that the data consist of, if they do.

    Held out are the validation files, or else the data set's own validation split, or else `validation_share` of the
    text. `on_read` is called many times a second, now and in later readings; an exception from it ends the reading.
    Without a data set, only the validation files are read. Raises the errors of `check_spec`, `DataError` if a file's
    text cannot be read, and `Unavailable` if the hub cannot be reached.
    """
    if spec.validation:
        _check_files(spec)
    else:
        check_spec(spec)
    text = spec.without_mixed.dataset
    name = text[0] if text else ""
    is_local = not is_named(name)
    paths = [Path(name) for name in (*(text if is_local else ()), *spec.validation)]
    total_bytes = sum(check_file(path).size_bytes * passes(path) for path in paths)

    def read(size_bytes: int) -> None:
        on_read(size_bytes, total_bytes)

    def tick() -> None:
        read(0)

    files = [open_file(Path(path), read) for path in text] if is_local else []
    held_out = [open_file(Path(path), read) for path in spec.validation]
    if is_local:
        corpus = _open_files(files, None if spec.validation else validation_share)
    elif name == BUILTIN:
        corpus = _open_builtin()
    elif name in HUB:
        corpus = _open_hub(HUB[name], tick)
    else:
        assert story_set is not None
        corpus = _open_stories(story_set, None if spec.validation else validation_share, held_out, tick)
    if not spec.validation:
        return corpus
    return replace(
        corpus,
        held_out_source=_names(held_out),
        revision=_digest(corpus.revision, [[file.kind, file.digest] for file in held_out]),
        notices=(*corpus.notices, *_notices(held_out)),
        validation=lambda: _passages(held_out),
    )


def _accepted() -> str:
    return f"Use {BUILTIN}, {', '.join(HUB)}, teacher:<name>, or local files ending in {', '.join(ENDINGS)}."


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps([READER_VERSION, *values]).encode()).hexdigest()


def _open_builtin() -> Corpus:
    return Corpus(
        source=BUILTIN,
        held_out_source=BUILTIN,
        revision=_digest(BUILTIN, stories.GENERATOR_VERSION),
        notices=(),
        train=lambda: map(Passage, stories.train_stories()),
        validation=lambda: map(Passage, stories.validation_stories()),
    )


def _open_files(files: list[TextFile], share: float | None) -> Corpus:
    source = _names(files)
    content = [[file.kind, file.digest] for file in files]
    notices = _notices(files)
    if share is None:
        return Corpus(source, source, _digest(content), notices, lambda: _passages(files), lambda: iter(()))
    rule, split = hold_out(lambda: _passages(files), np.concatenate([file.lengths for file in files]), share)
    return Corpus(
        source=source,
        held_out_source=source,
        revision=_digest(content, share),
        notices=(*notices, rule),
        train=lambda: split(False),
        validation=lambda: split(True),
    )


def _names(files: list[TextFile]) -> str:
    """Returns the names of files for display; of more than three, the first three and a count."""
    names = [excerpt(file.path.name, 36) for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")


def _notices(files: list[TextFile]) -> tuple[str, ...]:
    return tuple(notice for file in files for notice in file.notices)


def _passages(files: list[TextFile]) -> Iterator[Passage]:
    for file in files:
        yield from file.passages()


def _open_hub(dataset: HubDataset, tick: Callable[[], None]) -> Corpus:
    corpus = HubCorpus(dataset, tick)
    source = " ".join(filter(None, [dataset.repository, dataset.configuration]))
    return Corpus(
        source=source,
        held_out_source=source,
        revision=_digest(dataset.repository, dataset.configuration, corpus.hash),
        notices=(),
        train=lambda: corpus.read("train"),
        validation=lambda: corpus.read("validation"),
    )


def _open_stories(given: StorySet, share: float | None, files: list[TextFile], tick: Callable[[], None]) -> Corpus:
    """Opens the stories that pass the filters; held out are the files, or else a share of the stories.

    A story stays on its side as the set grows, so an older version has trained on none of the held-out stories.
    """
    filtered = filter_texts(given.texts, (passage.text for passage in _passages(files)), tick)
    kept = [given.stories[place] for place in filtered.kept]
    passages, held_out, notices = [Passage(story.text) for story in kept], list[Passage](), list[str]()
    dropped = Counter(filtered.dropped)
    if share is not None:
        held = [is_held_out(story.key, share) for story in kept]
        held_out = list(compress(passages, held))
        passages = [passage for passage, is_held in zip(passages, held, strict=True) if not is_held]
        rule = f"{len(held_out):,} of {len(kept):,} stories, chosen by their keys, are held out for validation."
        runs = HeldOutRuns((passage.text for passage in held_out), WordGrams(), tick)
        apart = [passage for passage in passages if not runs.overlap(words_of(passage.text))]
        dropped[Reason.OVERLAP] += len(passages) - len(apart)
        passages, notices = apart, [rule]
    counts = how_many(given.name, len(given.texts), dropped)
    if not passages and held_out:
        raise DataError(f"{counts} All that are left are held out: ask for more stories.")
    if not passages:
        raise DataError(counts)
    return Corpus(
        source=given.name,
        held_out_source=given.name,
        revision=_digest(*([passage.text for passage in split] for split in (passages, held_out))),
        notices=(counts, *notices),
        train=lambda: iter(passages),
        validation=lambda: iter(held_out),
    )
