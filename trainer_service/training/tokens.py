"""From text to tokens: opens the corpus, gets its tokenizer, and keeps both splits as shards of tokens."""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path

import numpy as np

from shared.errors import DataError, FailedPrecondition, InvalidArgument, ResourceExhausted
from shared.gpt.tokenizer import Tokenizer, load_gpt2, train_bpe
from trainer_service.training.batches import Tokens
from trainer_service.training.config import TrainingConfig
from trainer_service.training.corpus import Corpus, DatasetSpec, open_corpus
from trainer_service.training.local_files import Passage
from trainer_service.training.shards import ShardHeader, read_shard, write_shard

# Text beyond this changes a vocabulary of some thousand tokens little.
TOKENIZER_CHARACTERS = 32 << 20
BATCH_CHARACTERS = 1 << 20


class Stage(StrEnum):
    """What preparing is doing, in words."""

    OPEN = "reading the text"
    TOKENIZER = "training the tokenizer"
    TRAIN = "tokenising the training text"
    VALIDATION = "tokenising the held-out text"


@dataclass(frozen=True)
class PrepareProgress:
    """How far a stage has come. `limit` is the most tokens that it can make, 0 where it makes none."""

    stage: Stage
    tokens: int = 0
    limit: int = 0

    @property
    def fraction(self) -> float | None:
        """How much of `limit` is made, 0 to 1; None where the stage makes no tokens."""
        return self.tokens / self.limit if self.limit else None


@dataclass(frozen=True)
class PreparedData:
    """What a run reads: both splits as memory-mapped tokens, (N,) each, with an end token after every document."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    source: str
    revision: str
    notices: tuple[str, ...]


Report = Callable[[PrepareProgress], None]


def prepare(
    spec: DatasetSpec, config: TrainingConfig, directory: Path, report: Report, tokenizer: Tokenizer | None = None
) -> PreparedData:
    """The tokens of a data set, from shards below `directory` where they are there, else made and kept.

    `tokenizer` is that of the version which a run continues; without one it is the one that the configuration asks for.
    No more is tokenised than the run will read. What `report` raises ends the work and leaves no partial file. Several
    processes may prepare the same data at once. Raises as `open_corpus` does, `DataError` where there is less text than
    one window, and `ResourceExhausted` or `FailedPrecondition` where `directory` cannot be written.
    """
    window = config.context_length + 1
    train_limit = config.max_train_tokens or config.max_steps * config.batch_size * window
    validation_limit = config.max_validation_tokens or config.evaluation_windows * config.context_length + 1
    report(PrepareProgress(Stage.OPEN))
    corpus = open_corpus(spec, config.validation_share)
    tokenizer = tokenizer or _tokenizer(corpus, config, directory / "tokenizers", report)
    folder = directory / "shards" / _key(corpus.revision, tokenizer.digest)
    train = _tokens(corpus, Stage.TRAIN, tokenizer, folder / "train.bin", train_limit, report)
    validation = _tokens(corpus, Stage.VALIDATION, tokenizer, folder / "validation.bin", validation_limit, report)
    _check_size("training", train.size, window, corpus.source, "add text")
    _check_size("held-out", validation.size, window, corpus.source, "raise validation_share or name a longer file")
    windows = (validation.size - 1) // config.context_length
    few = f"The held-out text fills only {windows} of the {config.evaluation_windows} evaluation windows."
    notices = (*corpus.notices, few) if windows < config.evaluation_windows else corpus.notices
    return PreparedData(tokenizer, train, validation, corpus.source, corpus.revision, notices)


def _key(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


def _check_size(which: str, count: int, window: int, source: str, remedy: str) -> None:
    if count < window:
        raise DataError(
            f"The {which} text of {source} holds {count} tokens, but one window of context_length takes {window}: "
            f"{remedy}, or set a smaller context_length."
        )


def _tokenizer(corpus: Corpus, config: TrainingConfig, folder: Path, report: Report) -> Tokenizer:
    if config.tokenizer == "gpt2":
        return load_gpt2()
    path = folder / f"{_key(corpus.revision, config.vocabulary_size, TOKENIZER_CHARACTERS)}.json"
    if path.exists():
        try:
            return Tokenizer.load(path)
        except InvalidArgument:
            path.unlink(missing_ok=True)  # damaged: it is trained anew

    def texts() -> Iterator[str]:
        characters = 0
        for batch in _batches(corpus.train()):
            report(PrepareProgress(Stage.TOKENIZER))
            for passage in batch:
                yield passage.text
                characters += len(passage.text)
            if characters >= TOKENIZER_CHARACTERS:
                return

    tokenizer = train_bpe(texts(), config.vocabulary_size)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    return tokenizer


def _tokens(corpus: Corpus, stage: Stage, tokenizer: Tokenizer, path: Path, limit: int, report: Report) -> Tokens:
    """A split from its shard, which is written first where it is not there or holds too little."""
    tokens = read_shard(path, limit)
    if tokens is None:
        split = corpus.train if stage is Stage.TRAIN else corpus.validation
        header = ShardHeader(tokenizer.digest, corpus.source, corpus.revision, path.stem)
        with _writing(path.parent):
            write_shard(path, header, _encode(split(), stage, tokenizer, limit, report), limit)
        tokens = read_shard(path, limit)
        assert tokens is not None
    return tokens


def _encode(
    passages: Iterable[Passage], stage: Stage, tokenizer: Tokenizer, limit: int, report: Report
) -> Iterator[Tokens]:
    """The tokens of some passages, a batch of them at a time, (N,) each."""
    count = 0
    for batch in _batches(passages):
        encoded = tokenizer.encode_batch([passage.text for passage in batch])
        for passage, tokens in zip(batch, encoded, strict=True):
            if passage.ends_document:
                tokens.append(tokenizer.end_token)
        array = np.fromiter(chain.from_iterable(encoded), dtype=np.uint16)  # (N,)
        count += array.size
        report(PrepareProgress(stage, min(count, limit), limit))
        yield array


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    batch, characters = [], 0
    for passage in passages:
        batch.append(passage)
        characters += len(passage.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Errors of the disk as sentences; those of reading text are others by then."""
    try:
        yield
    except OSError as error:
        text = f"The prepared data cannot be written to {folder}: {error.strerror}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(f"{text} Free some space, or set max_train_tokens.") from None
        raise FailedPrecondition(text) from None
