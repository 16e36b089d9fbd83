"""Prepares the stories of a large teacher that a run reads beside other text: filters them and stores their tokens."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from shared.atomic_file import replacing
from shared.errors import DataError
from shared.gpt.tokenizer import Tokenizer
from trainer_service.distillation.ledger import Story
from trainer_service.text import filters, token_cache
from trainer_service.text.corpus import Corpus
from trainer_service.text.filters import Reason, filter_texts, how_many
from trainer_service.text.shards import read_shard, write_shard
from trainer_service.text.story_set import StorySet
from trainer_service.training.batches import TeacherText

# Between a prompt and its story.
SEPARATOR = "\n\n"
_BATCH_STORIES = 500
# The files of a set's tokens. The last is written last.
_TOKENS, _COUNTED, _RESULT = "teacher.bin", "counted.bin", "filtered.json"


@dataclass(frozen=True)
class PreparedStories:
    """The tokens of the stories that pass the filters, their digest, and a sentence on how many those are."""

    text: TeacherText
    digest: str
    notice: str


def prepare_stories(
    given: StorySet, corpus: Corpus, tokenizer: Tokenizer, prompts: bool, directory: Path, tick: Callable[[], object]
) -> PreparedStories:
    """Returns the tokens of a teacher's stories, each with an end token, from the files below `directory`; filters and
    tokenises the stories if the files are missing.

    With `prompts`, each story follows its prompt, whose tokens do not count. Stories that overlap with the held-out
    text of `corpus` are dropped. `tick` is called many times a second; an exception from it ends the work. Raises
    `DataError` if no story is left, and `OSError` if `directory` cannot be written.
    """
    stories = [Story(each.key, each.prompt if prompts else "", each.text) for each in given.stories]
    revision = _digest(corpus.revision, filters.VERSION, prompts, _content(stories))
    folder = directory / _digest(revision, tokenizer.digest)[:20]
    token_cache.mark_used(folder)
    prepared = _read(folder, given, prompts)
    if prepared is None:
        filtered = filter_texts(given.texts, (passage.text for passage in corpus.validation()), tick)
        if not filtered.kept:
            raise DataError(how_many(given.name, len(stories), filtered.dropped))
        kept = [stories[place] for place in filtered.kept]
        tokens, counted = _encode(kept, tokenizer, tick)
        origin = {"tokenizer": tokenizer.digest, "source": given.name, "revision": revision}
        write_shard(folder / _TOKENS, origin, [tokens], None)
        if prompts:
            write_shard(folder / _COUNTED, origin, [counted], None)
        with replacing(folder / _RESULT) as file:
            file.write(json.dumps({"digest": _digest(_content(kept)), "dropped": filtered.dropped}).encode())
        prepared = _read(folder, given, prompts)
        assert prepared is not None
    return prepared


def _read(folder: Path, given: StorySet, prompts: bool) -> PreparedStories | None:
    """Returns what an earlier call has stored, or None if a file is missing or damaged."""
    try:
        result = json.loads((folder / _RESULT).read_bytes())
        digest, dropped = str(result["digest"]), {Reason(each): int(n) for each, n in result["dropped"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    tokens = read_shard(folder / _TOKENS, None)
    counted = read_shard(folder / _COUNTED, None) if prompts else None
    if tokens is None or (prompts and (counted is None or counted.size != tokens.size)):
        return None
    text = TeacherText(tokens, None if counted is None else counted.astype(np.bool_))
    return PreparedStories(text, digest, how_many(given.name, len(given.stories), dropped))


def _encode(stories: list[Story], tokenizer: Tokenizer, tick: Callable[[], object]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of prompts and stories, (M,), and for each whether it counts, (M,)."""
    tokens, counted = list[np.ndarray](), list[np.ndarray]()
    for first in range(0, len(stories), _BATCH_STORIES):
        some = stories[first : first + _BATCH_STORIES]
        prompts = tokenizer.encode_batch([each.prompt + SEPARATOR if each.prompt else "" for each in some])
        texts = tokenizer.encode_batch([each.text for each in some])
        parts = [(prompt, [*text, tokenizer.end_token]) for prompt, text in zip(prompts, texts, strict=True)]
        tokens.append(np.fromiter(chain.from_iterable(chain.from_iterable(parts)), dtype=np.uint16))
        counted += [np.repeat([False, True], [len(prompt), len(text)]) for prompt, text in parts]
        tick()
    return np.concatenate(tokens), np.concatenate(counted)


def _content(stories: list[Story]) -> list[list[str]]:
    return [[each.prompt, each.text] for each in stories]


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
