"""The text of a benchmark as tokens in a folder, which can be carried to a machine without a network."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from shared.gpt.tokenizer import Tokenizer
from trainer_service.training.batches import Tokens
from trainer_service.training.config import TrainingConfig

_TRAIN, _HELD_OUT, _TOKENIZER = "train.npy", "held_out.npy", "tokenizer.json"


@dataclass(frozen=True)
class Material:
    """Training and held-out tokens, (N,) each, with an end token after every document, and their tokenizer."""

    train: Tokens
    held_out: Tokens
    tokenizer: Tokenizer

    @classmethod
    def prepare(cls, files: Sequence[str], config: TrainingConfig, folder: Path) -> "Material":
        """Tokenises files as a run with these values does, but whole, and writes the tokens into a folder.

        `validation_share` of the documents are held out. `max_train_tokens` limits the training text. Raises the errors
        of `trainer_service.text.tokens.prepare`.
        """
        from trainer_service.text.corpus import DatasetSpec
        from trainer_service.text.tokens import prepare

        whole = config.override({} if config.max_train_tokens else {"max_train_tokens": str(10**9)})
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as cache:
            data = prepare(DatasetSpec(tuple(files)), whole, Path(cache), lambda *_: None, whole_validation=True)
            np.save(folder / _TRAIN, data.train)
            np.save(folder / _HELD_OUT, data.validation)
            data.tokenizer.save(folder / _TOKENIZER)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "Material":
        """Reads a folder that `prepare` wrote; needs neither the files of text nor a network."""
        return cls(np.load(folder / _TRAIN), np.load(folder / _HELD_OUT), Tokenizer.load(folder / _TOKENIZER))

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Returns whether a folder holds prepared text."""
        return (folder / _TOKENIZER).exists()

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens and of the tokenizer, in hexadecimal."""
        both = self.train.tobytes() + self.held_out.tobytes()
        return hashlib.sha256(both + self.tokenizer.digest.encode()).hexdigest()

    def __str__(self) -> str:
        ends = [int((tokens == self.tokenizer.end_token).sum()) for tokens in (self.train, self.held_out)]
        return (
            f"training text: {self.train.size:,} tokens, {ends[0]:,} documents; held out: {self.held_out.size:,} "
            f"tokens, {ends[1]:,} documents; vocabulary: {self.tokenizer.vocabulary_size:,}"
        )
