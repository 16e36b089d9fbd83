"""The text of a training run: the built-in stories, a data set of the Hugging Face hub, or local files."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import InvalidArgument, Unavailable
from trainer_service.training import stories
from trainer_service.training.local_files import ENDINGS, Passage, TextFile, check_file, open_file

BUILTIN = "builtin"
# Part of every revision: raise it whenever the same content is read as other documents.
READER_VERSION = 1


@dataclass(frozen=True)
class DatasetSpec:
    """What a person named: one data set or several local files, and local files to hold out, if any."""

    dataset: tuple[str, ...]
    validation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Two streams of text that share no part; each call of `train` and `validation` begins anew.

    `revision` stands for the content of both. `notices` are sentences that a person should see.
    """

    source: str
    revision: str
    notices: tuple[str, ...]
    train: Callable[[], Iterator[Passage]]
    validation: Callable[[], Iterator[Passage]]


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub with the splits `train` and `validation` and the column `text`."""

    repository: str
    configuration: str | None = None
    # Rows are lines of articles, not documents.
    has_article_lines: bool = False


WIKITEXT = HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", has_article_lines=True)
HUB = {
    "roneneldan/TinyStories": HubDataset("roneneldan/TinyStories"),
    "wikitext-103": WIKITEXT,
    "Salesforce/wikitext": WIKITEXT,
}


def check_spec(spec: DatasetSpec) -> None:
    """Raises what is wrong with the names and files, as far as it can be told without reading text or the network.

    `InvalidArgument` for names, `NotFound` for files that do not exist, `DataError` for files that cannot be read.
    """
    if not spec.dataset:
        raise InvalidArgument(f"No data set is named. {_accepted()}")
    named = [name for name in spec.dataset if name == BUILTIN or name in HUB]
    if named and len(spec.dataset) > 1:
        raise InvalidArgument(f"{named[0]} stands alone: only local files can be used together.")
    for name in () if named else spec.dataset:
        if not Path(name).suffix and not Path(name).exists():
            raise InvalidArgument(f"Unknown data set {name!r}. {_accepted()}")
        check_file(Path(name))
    for name in spec.validation:
        check_file(Path(name))
    paths = [Path(name).resolve() for name in (*(() if named else spec.dataset), *spec.validation)]
    for path in paths:
        if paths.count(path) > 1:
            raise InvalidArgument(f"The file {path} is named twice; each file can be used once.")


def absolute(spec: DatasetSpec) -> DatasetSpec:
    """The same with the paths of files made absolute, so that another process finds them."""

    def resolve(name: str) -> str:
        return name if name == BUILTIN or name in HUB else str(Path(name).absolute())

    return DatasetSpec(tuple(map(resolve, spec.dataset)), tuple(map(resolve, spec.validation)))


def open_corpus(spec: DatasetSpec, validation_share: float) -> Corpus:
    """The text that is named; local files are read through once.

    Raises as `check_spec` does, `DataError` where a file's text cannot be read, and `Unavailable` where the hub cannot
    be reached. What is held out: the validation files; else the data set's own split; else `validation_share`.
    """
    check_spec(spec)
    name = spec.dataset[0]
    if name == BUILTIN:
        corpus = _open_builtin()
    elif name in HUB:
        corpus = _open_hub(HUB[name])
    else:
        corpus = _open_files(
            [open_file(Path(path)) for path in spec.dataset], None if spec.validation else validation_share
        )
    if not spec.validation:
        return corpus
    held_out = [open_file(Path(path)) for path in spec.validation]
    return replace(
        corpus,
        revision=_digest(corpus.revision, [file.digest for file in held_out]),
        notices=(*corpus.notices, *_notices(held_out)),
        validation=lambda: _passages(held_out),
    )


def _accepted() -> str:
    return f"It can be {BUILTIN}, {', '.join(HUB)}, or local files ending in {', '.join(ENDINGS)}."


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps([READER_VERSION, *values]).encode()).hexdigest()


def _open_builtin() -> Corpus:
    return Corpus(
        source=BUILTIN,
        revision=_digest(BUILTIN, stories.GENERATOR_VERSION),
        notices=(),
        train=lambda: map(Passage, stories.train_stories()),
        validation=lambda: map(Passage, stories.validation_stories()),
    )


def _open_files(files: list[TextFile], share: float | None) -> Corpus:
    names = [file.path.name for file in files]
    source = ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")
    whole = Corpus(
        source=source,
        revision=_digest([[file.path.suffix, file.digest] for file in files]),
        notices=_notices(files),
        train=lambda: _passages(files),
        validation=lambda: iter(()),
    )
    return whole if share is None else _hold_out(whole, share)


def _notices(files: list[TextFile]) -> tuple[str, ...]:
    return tuple(
        f"{file.path.name} has no <|endoftext|> marker, so the whole file is one document."
        for file in files
        if file.is_one_document
    )


def _passages(files: list[TextFile]) -> Iterator[Passage]:
    for file in files:
        yield from file.passages()


def _hold_out(whole: Corpus, share: float) -> Corpus:
    """Every k-th document is held out; where there are fewer than k of them, the end of each."""
    enough = math.ceil(1 / share)
    lengths = _document_lengths(whole.train(), enough)
    if len(lengths) == enough:
        rule = f"{share:.1%} of the documents, evenly spread, are held out for validation."

        def split(held_out: bool) -> Iterator[Passage]:
            return _split_documents(whole.train(), share, held_out)
    else:
        rule = f"The last {share:.1%} of each document is held out: there are fewer than {enough} documents."

        def split(held_out: bool) -> Iterator[Passage]:
            return _split_positions(whole.train(), lengths, share, held_out)

    return replace(
        whole,
        revision=_digest(whole.revision, share),
        notices=(*whole.notices, rule),
        train=lambda: split(False),
        validation=lambda: split(True),
    )


def _document_lengths(passages: Iterable[Passage], most: int) -> list[int]:
    """The characters of each document, of so many documents at most."""
    lengths, characters = [], 0
    for passage in passages:
        characters += len(passage.text)
        if passage.ends_document:
            lengths.append(characters)
            characters = 0
            if len(lengths) == most:
                break
    return lengths


def _split_documents(passages: Iterable[Passage], share: float, held_out: bool) -> Iterator[Passage]:
    """The documents with which the share of all so far passes the next whole number, or the others."""

    def held_out_before(index: int) -> int:
        return math.floor(index * share + 1e-9)  # so that 49 * (1 / 49) is 1

    index = 0
    for passage in passages:
        if (held_out_before(index + 1) > held_out_before(index)) == held_out:
            yield passage
        index += passage.ends_document


def _split_positions(
    passages: Iterable[Passage], lengths: list[int], share: float, held_out: bool
) -> Iterator[Passage]:
    """The end of each document from the first space behind the share's position, or what stands before it."""
    index, position = 0, 0
    for passage in passages:
        text = passage.text
        cut = int(lengths[index] * (1 - share)) - position
        if cut < 0:
            cut = 0
        elif cut < len(text):
            space = text.find(" ", cut)
            cut = len(text) if space < 0 else space
        yield Passage(text[cut:] if held_out else text[:cut], passage.ends_document)
        position += len(text)
        if passage.ends_document:
            index, position = index + 1, 0


def _open_hub(dataset: HubDataset) -> Corpus:
    # Loading `datasets` takes seconds, which only those who use the hub need to wait.
    import datasets  # type: ignore[import-untyped]

    try:
        builder = datasets.load_dataset_builder(dataset.repository, dataset.configuration)
    # The hub's libraries raise errors of many kinds; to a person they all mean this.
    except Exception as error:
        raise _unavailable(dataset, error) from error

    def read(split: str) -> Iterator[Passage]:
        try:
            texts = (row["text"] for row in builder.as_streaming_dataset(split=split))
            for text in _articles(texts) if dataset.has_article_lines else texts:
                if text.strip():
                    yield Passage(text.strip())
        except Exception as error:
            raise _unavailable(dataset, error) from error

    return Corpus(
        source=" ".join(filter(None, [dataset.repository, dataset.configuration])),
        revision=_digest(dataset.repository, dataset.configuration, builder.hash),
        notices=(),
        train=lambda: read("train"),
        validation=lambda: read("validation"),
    )


def _unavailable(dataset: HubDataset, error: Exception) -> Unavailable:
    return Unavailable(
        f"The data set {dataset.repository} cannot be downloaded: {error}. "
        f"Try again when the hub can be reached, or use {BUILTIN} or a local file."
    )


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines joined to articles, each of which begins with a heading of the first level, " = Title = "."""
    article: list[str] = []
    for line in lines:
        if article and re.fullmatch(r" = [^=]+ = \n?", line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)
