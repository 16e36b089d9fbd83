"""Prepares a corpus: trains or loads its tokenizer, and stores both splits as shards of tokens."""

import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from pathlib import Path

import numpy as np

from shared.errors import DataError, FailedPrecondition, InvalidArgument, ResourceExhausted
from shared.gpt.tokenizer import LONGEST_WORD, Tokenizer, load_gpt2, train_bpe
from trainer_service.text import background, bpe_process, token_cache
from trainer_service.text.corpus import Corpus, DatasetSpec, open_corpus
from trainer_service.text.documents import Passage
from trainer_service.text.shards import portable_name, read_shard, sufficient, write_shard
from trainer_service.text.shared_tokens import SharedTokens
from trainer_service.text.story_set import read_story_set
from trainer_service.text.teacher_text import prepare_stories
from trainer_service.training.batches import TeacherText, Tokens
from trainer_service.training.config import TrainingConfig

# More text than this hardly changes a vocabulary of several thousand tokens.
TOKENIZER_CHARACTERS = 32 << 20
BATCH_CHARACTERS = 1 << 20
REPORT_INTERVAL_S = 0.1


class Stage(StrEnum):
    """The stages of preparation, in words."""

    OPEN = "reading the text"
    FETCH = "looking for what another machine has prepared"
    SHARE = "sharing what was prepared"
    TOKENIZER = "training the tokenizer"
    TRAIN = "tokenising the training text"
    VALIDATION = "tokenising the held-out text"
    STORIES = "filtering and tokenising the teacher's stories"


@dataclass(frozen=True)
class PreparedData:
    """The data of a run: both splits as memory-mapped tokens, (N,) each, with an end token after every document.

    `config` is the run's configuration with the size of the tokenizer's vocabulary. `teacher` holds the stories of a
    large teacher that are mixed with the training text. `stories` is how many of the set were read, before the filters;
    None without a set. `revision` is that of the other text, and after a + that of the teacher's stories.
    """

    config: TrainingConfig
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    source: str
    held_out_source: str
    revision: str
    notices: tuple[str, ...]
    teacher: TeacherText | None = None
    stories: int | None = None


# Receives the stage and the share of it that is done, from 0 to 1; None if the share is unknown.
Report = Callable[[Stage, float | None], object]


class _Progress:
    """Reports the start of each stage at once, and its progress every `REPORT_INTERVAL_S`.

    `tick` must be called more often than that, always from the same thread. Counts are bytes, characters or tokens; a
    total of 0 is unknown.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._stage, self._done, self._total = Stage.OPEN, 0, 0
        self._reported_s = 0.0

    def begin(self, stage: Stage, total: int = 0) -> None:
        self._stage = stage
        self.reach(0, total)

    def reach(self, done: int, total: int) -> None:
        """Reports the progress of the stage, however recent the last report is."""
        self._done, self._total = done, total
        self._reported_s = time.monotonic()
        self._report(self._stage, min(done / total, 1.0) if total else None)

    def read(self, size_bytes: int, total_bytes: int) -> None:
        """Counts the bytes that were read in the first stage."""
        if self._stage is Stage.OPEN:
            self._done, self._total = self._done + size_bytes, total_bytes
        self.tick()

    def tick(self, done: int = 0, total: int = 0) -> None:
        """Reports the progress if the last report is old. The receiver of the report ends the work by raising."""
        if total:
            self._done, self._total = done, total
        if time.monotonic() - self._reported_s >= REPORT_INTERVAL_S:
            self.reach(self._done, self._total)


def prepare(
    spec: DatasetSpec,
    config: TrainingConfig,
    directory: Path,
    report: Report,
    tokenizer: Tokenizer | None = None,
    *,
    whole_validation: bool = False,
    stories: int | None = None,
    shared: SharedTokens | None = None,
) -> PreparedData:
    """Returns the tokens of a data set, from the shards below `directory`; tokenises the text if they are missing.

    With `shared`, what another machine has prepared is fetched instead, and what this one prepares is shared.

    `tokenizer` is that of the version which a run continues. Without one, the configuration decides; a tokenizer that
    is trained on little text may get fewer tokens than configured. Only the text that the run will read is tokenised,
    or with `whole_validation` all held-out text, which may then be shorter than a window. `report` is called several
    times a second; an exception from it ends the work and leaves no partial file. Several processes may prepare the
    same data at once. Without a data set, `train` is empty. Of a teacher's stories, the first `stories` are read, or
    all of them: a run reads those that it was queued with, although their set has grown. Raises the errors of
    `open_corpus`, `read_story_set` and `prepare_stories`, `DataError` if a split is shorter than one window, and
    `ResourceExhausted` or `FailedPrecondition` if `directory` cannot be written.
    """
    window = config.context_length + 1
    train_limit = config.max_train_tokens or config.max_steps * config.batch_size * window
    validation_limit: int | None = None
    if not whole_validation:
        validation_limit = config.max_validation_tokens or config.evaluation_windows * config.context_length + 1
    progress = _Progress(report)
    cache = _Cache(shared, progress)
    progress.begin(Stage.OPEN)
    story_set = read_story_set(directory, spec.story_set, stories) if spec.story_set else None
    if config.teacher_prompts and story_set and not spec.mixes_stories:
        raise InvalidArgument(
            f"teacher_prompts needs other text beside {story_set.name}, as in --dataset 'builtin {story_set.name}': "
            "alone it is an ordinary data set, without prompts."
        )
    corpus = open_corpus(spec, config.validation_share, progress.read, story_set)
    notices = list(corpus.notices)
    if story_set and not story_set.is_whole:
        notices.append(
            f"{story_set.name} has grown since the run was queued; the run reads the first {stories:,} stories."
        )
    if tokenizer is None:
        tokenizer = _tokenizer(corpus, config, directory / "tokenizers", cache)
        if tokenizer.vocabulary_size < config.vocabulary_size:
            notices.append(
                f"The text is enough for a vocabulary of only {tokenizer.vocabulary_size:,} tokens, not "
                f"{config.vocabulary_size:,}; the model uses this size."
            )
    config = replace(config, vocabulary_size=tokenizer.vocabulary_size)
    folder = directory / "shards" / _key(corpus.revision, tokenizer.digest)
    token_cache.mark_used(folder)
    token_cache.remove_unused(directory / "shards")
    is_growing = bool(spec.story_set) and not spec.mixes_stories
    more = "ask for more stories" if is_growing else "add text"
    train = np.empty(0, dtype=np.uint16)
    if spec.dataset:
        train = _tokens(corpus, Stage.TRAIN, tokenizer, folder / "train.bin", train_limit, cache)
        if not whole_validation:
            _check_size("training", train.size, window, corpus.source, more)
    validation = _tokens(corpus, Stage.VALIDATION, tokenizer, folder / "validation.bin", validation_limit, cache)
    remedy = more if spec.validation else "raise validation_share or name a longer file"
    if not spec.validation and is_growing:
        remedy = f"raise validation_share or {more}"
    if not whole_validation:
        _check_size("held-out", validation.size, window, corpus.held_out_source, remedy)
    elif not validation.size:
        raise DataError(f"The held-out text of {corpus.held_out_source} is empty: {remedy}.")
    windows = (validation.size - 1) // config.context_length
    if windows < config.evaluation_windows and not whole_validation:
        notices.append(f"The held-out text fills only {windows} of the {config.evaluation_windows} evaluation windows.")
    data = PreparedData(
        config=config,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        source=corpus.source,
        held_out_source=corpus.held_out_source,
        revision=corpus.revision,
        notices=tuple(notices),
        stories=len(story_set.stories) if story_set else None,
    )
    if story_set is None or not spec.mixes_stories:
        return data
    progress.begin(Stage.STORIES)
    shards = directory / "shards"
    with _writing(shards):
        teacher = prepare_stories(story_set, corpus, tokenizer, config.teacher_prompts, shards, progress.tick)
    _check_size("training", teacher.text.tokens.size, window, story_set.name, "ask for more stories")
    return replace(
        data,
        source=f"{corpus.source}, {story_set.name}",
        revision=f"{corpus.revision}+{teacher.digest}",
        notices=(*data.notices, teacher.notice),
        teacher=teacher.text,
    )


def _key(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


def _check_size(which: str, count: int, window: int, source: str, remedy: str) -> None:
    if count < window:
        raise DataError(
            f"The {which} text of {source} holds {count} tokens, but one window of context_length needs {window}: "
            f"{remedy}, or set a smaller context_length."
        )


class _Cache:
    """Shares files with other machines, if there is a place for it, in the background of the progress."""

    def __init__(self, shared: SharedTokens | None, progress: _Progress) -> None:
        self._shared = shared
        self.progress = progress

    def fetch(self, key: str, names: Callable[[list[str]], str | None], path: Path) -> bool:
        """Fetches the one of the shared files of a key that `names` chooses; returns whether there was one."""
        if (shared := self._shared) is None:
            return False
        self.progress.begin(Stage.FETCH)

        def fetch() -> bool:
            name = names(shared.names(key))
            return name is not None and shared.fetch(key, name, path)

        with _writing(path.parent):
            return background.call(fetch, self.progress.tick)

    def offer(self, key: str, name: str, path: Path) -> None:
        """Shares a file, unless another machine has already; its file then replaces this one."""
        if (shared := self._shared) is not None:
            self.progress.begin(Stage.SHARE)
            with _writing(path.parent):
                background.call(lambda: shared.offer(key, name, path), self.progress.tick)


def _tokenizer(corpus: Corpus, config: TrainingConfig, folder: Path, cache: _Cache) -> Tokenizer:
    progress = cache.progress
    if config.tokenizer == "gpt2":
        progress.begin(Stage.TOKENIZER)
        return background.call(load_gpt2, progress.tick)
    path = folder / f"{_key(corpus.revision, config.vocabulary_size, TOKENIZER_CHARACTERS, LONGEST_WORD)}.json"
    if path.exists() or cache.fetch(path.stem, lambda names: path.name if path.name in names else None, path):
        try:
            return Tokenizer.load(path)
        except InvalidArgument:
            path.unlink(missing_ok=True)  # damaged: train it again
    progress.begin(Stage.TOKENIZER)
    texts, characters = list[str](), 0
    for batch in _batches(corpus.train(), progress.tick):
        texts += [passage.text for passage in batch]
        characters += sum(len(passage.text) for passage in batch)
        if characters >= TOKENIZER_CHARACTERS:
            break
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if characters <= bpe_process.SHORT_CHARACTERS:
            tokenizer = train_bpe(texts, config.vocabulary_size)
        else:
            tokenizer = bpe_process.train_apart(texts, config.vocabulary_size, folder, progress.tick)
        tokenizer.save(path)
    cache.offer(path.stem, path.name, path)
    return Tokenizer.load(path)


def _tokens(corpus: Corpus, stage: Stage, tokenizer: Tokenizer, path: Path, limit: int | None, cache: _Cache) -> Tokens:
    """Returns a split, or its first `limit` tokens, from its shard; writes the shard first if it has too few."""
    progress, key = cache.progress, path.parent.name
    tokens = read_shard(path, limit)
    if tokens is None and cache.fetch(key, lambda names: sufficient(names, path.stem, limit), path):
        tokens = read_shard(path, limit)
    if tokens is None:
        split = corpus.train if stage is Stage.TRAIN else corpus.validation
        origin = {"tokenizer": tokenizer.digest, "source": corpus.source, "revision": corpus.revision}
        progress.begin(stage, limit or 0)
        with _writing(path.parent):
            write_shard(path, origin, _encode(split(), tokenizer, limit, progress), limit)
        cache.offer(key, portable_name(path), path)
        tokens = read_shard(path, limit)
        assert tokens is not None
    return tokens


def _encode(
    passages: Iterable[Passage], tokenizer: Tokenizer, limit: int | None, progress: _Progress
) -> Iterator[Tokens]:
    """Yields the tokens of passages, a batch of passages at a time, (N,) each."""
    count = 0
    for batch in _batches(passages, progress.tick):
        encoded = tokenizer.encode_batch([passage.text for passage in batch])
        for passage, tokens in zip(batch, encoded, strict=True):
            if passage.ends_document:
                tokens.append(tokenizer.end_token)
        array = np.fromiter(chain.from_iterable(encoded), dtype=np.uint16)  # (N,)
        count += array.size
        progress.reach(count, limit or 0)
        yield array


def _batches(passages: Iterable[Passage], tick: Callable[[], None]) -> Iterator[list[Passage]]:
    batch, characters = [], 0
    for passage in passages:
        tick()
        batch.append(passage)
        characters += len(passage.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns errors of writing into sentences; errors of reading text have their own types."""
    try:
        yield
    except OSError as error:
        text = f"The prepared data cannot be written to {folder}: {error.strerror}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(f"{text} Free some space, or set max_train_tokens.") from None
        raise FailedPrecondition(text) from None
