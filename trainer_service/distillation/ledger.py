"""The ledger of a set of paid calls: every call to the large teacher, before it is made and after its answer.

One file a set, `ledger.jsonl`, to which rows are appended and never changed. A row is on the disk before anything
relies on it, so what a set has cost is known after any crash: the answered calls, and the worst case of each call whose
answer is missing. Loads neither MLX nor the client of the service.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from shared.errors import AlreadyExists, FailedPrecondition, NotFound, shown
from shared.registry.commit import make_folder, sync
from trainer_service.distillation.answers import Answer, Kind
from trainer_service.distillation.prices import written
from trainer_service.distillation.prompts import Prompt

LEDGER_NAME = "ledger.jsonl"

_SENT, _ANSWERED, _REFUSED = "sent", "answered", "refused"
_COST = re.compile(r"[0-9]{1,9}(\.[0-9]{1,15})?")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Story:
    """A story of the teacher; `prompt` is the line that a student may read before it."""

    key: str
    prompt: str
    text: str


@dataclass
class Account:
    """What the rows of a ledger add up to.

    spent_usd: the cost of the calls that were answered or refused, and the worst case of those that are open.
    open_usd: the worst case of each call without an answer yet, by its key.
    answered: calls with an answer that can be used; `tokens` and `answered_usd` are what they took.
    refused: the other calls that have ended, by kind; `refused_usd` is what they cost.
    garbled: lines that are no rows, such as the torn end of one that was being written in a crash.
    """

    spent_usd: Decimal = Decimal(0)
    open_usd: dict[str, Decimal] = field(default_factory=dict)
    answered: int = 0
    answered_usd: Decimal = Decimal(0)
    refused: Counter[str] = field(default_factory=Counter)
    refused_usd: Decimal = Decimal(0)
    garbled: int = 0
    _paid: set[str] = field(default_factory=set)

    @property
    def charged_usd(self) -> Decimal:
        """The cost of the calls that have ended."""
        return self.answered_usd + self.refused_usd

    def may_ask(self, key: str) -> bool:
        """Whether the call has certainly not been paid for."""
        return key not in self._paid

    def add(self, row: Row) -> None:
        """Adds a row."""
        key, cost_usd = row["key"], Decimal(row["cost_usd"])
        self.spent_usd += cost_usd
        self._paid.add(key)
        if row["state"] == _SENT:
            self.open_usd[key] = cost_usd
            return
        self.spent_usd -= self.open_usd.pop(key, Decimal(0))
        if row["state"] == _ANSWERED:
            self.answered += 1
            self.answered_usd += cost_usd
        else:
            self.refused[row["kind"]] += 1
            self.refused_usd += cost_usd
            if not cost_usd:
                self._paid.discard(key)


class Ledger:
    """The ledger in a folder, open for writing by one process at a time; use it in a `with` block.

    Raises `AlreadyExists` if another process writes it, and `FailedPrecondition` if it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_NAME
        try:
            make_folder(folder, folder)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sync(folder)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise AlreadyExists(f"Another process writes {self.path} now; wait until it has ended.") from None
        self.account = read_account(folder)
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes and os.pread(self._descriptor, 1, size_bytes - 1) != b"\n":
            # Keeps the torn line apart from the next row.
            self._append(b"\n")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def sent(
        self, key: str, sample: int, model: str, template: str, most_usd: Decimal, prompt: Mapping[str, object]
    ) -> None:
        """Records a call that is about to be made, with the most that it can cost."""
        assert self.account.may_ask(key), "a call is never paid twice"
        self._add(_SENT, key, most_usd, sample=sample, model=model, template=template, prompt=prompt)

    def answered(self, key: str, cost_usd: Decimal, answer: Answer) -> None:
        """Records the answer to a call."""
        self._add(_ANSWERED, key, cost_usd, **asdict(answer))

    def refused(self, key: str, cost_usd: Decimal, kind: Kind) -> None:
        """Records that a call has ended without an answer that can be used."""
        self._add(_REFUSED, key, cost_usd, kind=kind.value)

    def _add(self, state: str, key: str, cost_usd: Decimal, **values: object) -> None:
        row = {"state": state, "key": key, "time": time.time(), "cost_usd": written(cost_usd), **values}
        # Written in ASCII, so that no character of an answer, such as U+2028, looks like the end of a line.
        self._append(json.dumps(row).encode() + b"\n")
        self.account.add(row)

    def _append(self, line: bytes) -> None:
        size_bytes = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            sync(self.path)
        except OSError as error:
            # Whoever writes next must not write behind half a row.
            with suppress(OSError):
                os.ftruncate(self._descriptor, size_bytes)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> FailedPrecondition:
        return FailedPrecondition(f"The ledger {self.path} cannot be written: {error.strerror}; check its disk.")


def stories_folder(data: Path, name: str) -> Path:
    """Returns the folder of a set of stories, below the folder of prepared data."""
    return data / "stories" / name


def key_of(model: str, template: str, parameters: Mapping[str, object], sample: int) -> str:
    """Returns the key of a call: a hash of everything that decides its answer, and of the number of the sample."""
    values = json.dumps([model, template, parameters, sample], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


def read_account(folder: Path) -> Account:
    """Returns what the ledger in a folder adds up to; an absent one adds up to nothing.

    Raises `FailedPrecondition` if it cannot be read.
    """
    account = Account()
    for row in _rows(folder / LEDGER_NAME):
        if row is None:
            account.garbled += 1
        else:
            account.add(row)
    return account


def last_rows(folder: Path) -> dict[int, Row]:
    """Returns the last row of each call, by the number of its sample; calls whose row `sent` is lost are left out.

    Raises `FailedPrecondition` if the ledger cannot be read.
    """
    samples: dict[str, int] = {}
    found: dict[int, Row] = {}
    for row in filter(None, _rows(folder / LEDGER_NAME)):
        if row["state"] == _SENT and type(row.get("sample")) is int:
            samples[row["key"]] = row["sample"]
        if row["key"] in samples:
            found[samples[row["key"]]] = row
    return found


def read_stories(folder: Path) -> list[Story]:
    """Returns the stories of a set in the order of their answers, also while a job writes more.

    An answer whose row `sent` is lost has no prompt and is left out. Raises `NotFound` if there is no such set.
    """
    path = folder / LEDGER_NAME
    if not path.exists():
        raise NotFound(
            f"There is no set of stories {shown(folder.name)}; `gptloop stories {folder.name}` asks for some."
        )
    prompts: dict[str, str] = {}
    stories: dict[str, Story] = {}
    for row in _rows(path):
        if row is None:
            continue
        key = row["key"]
        if row["state"] == _SENT:
            prompts[key] = _short(row.get("prompt"))
        elif row["state"] == _ANSWERED and key in prompts:
            stories[key] = Story(key, prompts[key], row["text"])
    return list(stories.values())


def _short(prompt: object) -> str:
    """Returns the line for students of a prompt as a row holds it; an empty one if it is no prompt for a story."""
    try:
        values: Any = prompt
        return Prompt(values["noun"], values["verb"], values["adjective"], tuple(values["features"])).short()
    except (KeyError, TypeError):
        return ""


def _rows(path: Path) -> Iterator[Row | None]:
    """Yields the rows of a ledger, and None for each line that is no row."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield _row(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FailedPrecondition(f"The ledger {path} cannot be read: {error.strerror}.") from error


def _row(line: bytes) -> Row | None:
    try:
        row: Row = json.loads(line)
        needed = {_SENT: "key", _ANSWERED: "text", _REFUSED: "kind"}[row["state"]]
        is_row = _COST.fullmatch(row["cost_usd"]) and isinstance(row["key"], str) and isinstance(row[needed], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return row if is_row else None
