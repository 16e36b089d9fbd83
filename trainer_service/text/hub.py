"""Reads data sets of the Hugging Face hub on a background thread, so that a slow network blocks nothing."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from shared.errors import Unavailable
from shared.text import excerpt
from trainer_service.text import background
from trainer_service.text.documents import Part, Passage, passages, whole

# The hub counts as unreachable if it sends nothing for this long.
SILENCE_S = 60.0
# Rows that pass between the threads together.
_ROWS = 64


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub with the splits `train` and `validation` and the column `text`."""

    repository: str
    configuration: str | None = None
    # Each row is a line of an article, not a document.
    has_article_lines: bool = False


WIKITEXT = HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", has_article_lines=True)
HUB = {
    "roneneldan/TinyStories": HubDataset("roneneldan/TinyStories"),
    "wikitext-103": WIKITEXT,
    "Salesforce/wikitext": WIKITEXT,
}


class HubCorpus:
    """The current version of a data set on the hub; raises `Unavailable` if the hub does not answer.

    Calls `tick` several times a second while it waits for the hub.
    """

    def __init__(self, dataset: HubDataset, tick: Callable[[], None]) -> None:
        self._dataset = dataset
        self._tick = tick
        (self._builder,) = self._fetched(_load(dataset) for _ in range(1))
        self.hash = str(self._builder.hash)

    def read(self, split: str) -> Iterator[Passage]:
        """Yields the documents of a split."""

        def batches() -> Iterator[list[str]]:
            rows = iter(self._builder.as_streaming_dataset(split=split))
            while batch := [row["text"] for row in islice(rows, _ROWS)]:
                yield batch

        texts = (text for batch in self._fetched(batches()) for text in batch if text is not None)
        articles = _articles(texts) if self._dataset.has_article_lines else texts
        return passages(Part(whole(text), ends_document=True) for text in articles)

    def _fetched(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields items from the hub. Its libraries raise errors of many types, which all become `Unavailable`."""

        def wrapped() -> Iterator[Any]:
            try:
                yield from items
            except Exception as error:
                raise Unavailable(excerpt(str(error) or type(error).__name__, 100)) from error

        try:
            yield from background.iterate(wrapped(), self._tick, SILENCE_S)
        except Unavailable as error:
            raise Unavailable(
                f"The data set {self._dataset.repository} cannot be downloaded: {str(error).rstrip('.')}. "
                "Try again later, or use builtin or a local file."
            ) from error


def _load(dataset: HubDataset) -> Any:
    # The libraries wait for minutes by default; they read these variables when they are imported.
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        os.environ.setdefault(name, "10")
    import huggingface_hub

    # One request without retries fails fast if the hub cannot be reached.
    huggingface_hub.HfApi().dataset_info(dataset.repository, timeout=10)
    # Loading `datasets` takes seconds, so only the hub's data sets load it.
    import datasets  # type: ignore[import-untyped]

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.config.STREAMING_READ_MAX_RETRIES = 3
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 3
    return datasets.load_dataset_builder(dataset.repository, dataset.configuration)


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Joins WikiText's lines to articles; each starts with a first-level heading, " = Title = "."""
    article: list[str] = []
    for line in lines:
        if article and re.fullmatch(r" = [^=]+ = \n?", line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)
