"""Data sets of the Hugging Face hub, read on a thread of their own, so that a slow network holds nothing up."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from shared.errors import Unavailable
from shared.text import excerpt
from trainer_service.training import background
from trainer_service.training.documents import Passage, passages, whole

# Nothing heard for so long means that the hub does not answer.
SILENCE_S = 60.0
# Rows that cross from one thread to the other at once.
_ROWS = 64


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


class HubCorpus:
    """A data set as it stands on the hub now; raises `Unavailable` if the hub does not answer.

    `tick` is called several times a second while the hub is waited for.
    """

    def __init__(self, dataset: HubDataset, tick: Callable[[], None]) -> None:
        self._dataset = dataset
        self._tick = tick
        (self._builder,) = self._heard(_load(dataset) for _ in range(1))
        self.hash = str(self._builder.hash)

    def read(self, split: str) -> Iterator[Passage]:
        """The documents of a split."""

        def batches() -> Iterator[list[str]]:
            rows = iter(self._builder.as_streaming_dataset(split=split))
            while batch := [row["text"] for row in islice(rows, _ROWS)]:
                yield batch

        texts = (text for batch in self._heard(batches()) for text in batch if text is not None)
        articles = _articles(texts) if self._dataset.has_article_lines else texts
        return passages((whole(text), True) for text in articles)

    def _heard(self, items: Iterable[Any]) -> Iterator[Any]:
        """What comes from the hub, whose libraries raise errors of many kinds; to a person they all mean the same."""

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
                "Try again when the hub can be reached, or use builtin or a local file."
            ) from error


def _load(dataset: HubDataset) -> Any:
    # The libraries' own patience is minutes; these are read when they are imported.
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        os.environ.setdefault(name, "10")
    import huggingface_hub

    # One question without retries: if it gets no answer, the many that follow need not be asked.
    huggingface_hub.HfApi().dataset_info(dataset.repository, timeout=10)
    # Loading `datasets` takes seconds, which only those who use the hub need to wait.
    import datasets  # type: ignore[import-untyped]

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.config.STREAMING_READ_MAX_RETRIES = 3
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 3
    return datasets.load_dataset_builder(dataset.repository, dataset.configuration)


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines joined to articles, each of which begins with a heading of the first level, " = Title = "."""
    article: list[str] = []
    for line in lines:
        if article and re.fullmatch(r" = [^=]+ = \n?", line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)
