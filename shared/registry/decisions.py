"""Decisions of operators and findings of servers, in small files beside the versions.

serving/policy                      the label of the version that serves by default; `best` if there is no file
serving/stable                      the number of the stable version
serving/findings/<n>.<device>.json  the finding about a version on a kind of device
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from shared.errors import CorruptCheckpoint, InvalidArgument, shown
from shared.registry.commit import files_state, locked, make_folder, replace_texts, writing
from shared.registry.evaluations import Figures
from shared.registry.findings import CORRUPT, Finding, Findings
from shared.registry.manifest import RUN_NAME, VersionManifest, typed
from shared.registry.numbering import NUMBER, children, is_number

LABELS = ("best", "latest", "stable")
_PINNED = "pinned:"
_RUN = "run:"
_FINDING = re.compile(rf"({NUMBER.pattern})\.[a-z0-9_]+\.json")


class BestBy(StrEnum):
    """What `best` compares: the bits per byte on the held-out windows of training, or those of evaluations."""

    TRAINING = "training"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Decided:
    """The versions that are known to be refused, the stable version, and the label of the version that serves.

    `best_by` is what `best` compares; `figures` are those of the evaluations of each version, the newest last.
    """

    refused: frozenset[int] = frozenset()
    stable: int | None = None
    policy: str = LABELS[0]
    best_by: BestBy = BestBy.TRAINING
    figures: Mapping[int, Sequence[Figures]] = field(default_factory=dict)


def check_label(label: str) -> str:
    """Returns the label if it can name a version; raises `InvalidArgument` if not."""
    pin, run = label.removeprefix(_PINNED), label.removeprefix(_RUN)
    if label in LABELS or (pin != label and is_number(pin)) or (run != label and RUN_NAME.fullmatch(run)):
        return label
    raise InvalidArgument(
        f"{shown(label)} is not a label; the labels are {', '.join(LABELS)}, {_RUN}<name> and {_PINNED}<version>."
    )


def pinned(number: int) -> str:
    """Returns the label that pins a version."""
    return f"{_PINNED}{number}"


def pinned_number(label: str) -> int | None:
    """Returns the version that a label pins; None for any other label."""
    return int(label.removeprefix(_PINNED)) if label.startswith(_PINNED) else None


def run_label(run: str) -> str:
    """Returns the label of the best version of a run."""
    return f"{_RUN}{run}"


def run_of(label: str) -> str | None:
    """Returns the run of a label `run:<name>`; None for any other label."""
    return label.removeprefix(_RUN) if label.startswith(_RUN) else None


class Decisions:
    """The decisions and findings of one registry.

    Methods that write raise `FailedPrecondition` if the disk fails. Methods that read a decision raise
    `CorruptCheckpoint` if its file is unreadable or invalid.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "serving"

    def policy(self) -> str:
        """Returns the label of the version that serves by default."""
        try:
            return check_label(_read(self._folder / "policy") or LABELS[0])
        except InvalidArgument as error:
            raise CorruptCheckpoint(f"{self._folder / 'policy'} cannot be understood: {error}") from None

    def set_policy(self, label: str) -> None:
        """Makes the version of a label serve by default; raises `InvalidArgument` if it is not a label."""
        self._write({"policy": check_label(label)})

    def stable(self) -> int | None:
        """Returns the number of the stable version, if there is one."""
        text = _read(self._folder / "stable")
        if text is not None and not is_number(text):
            raise CorruptCheckpoint(f"{self._folder / 'stable'} cannot be understood: {shown(text)} is not a version.")
        return None if text is None else int(text)

    def set_stable(self, number: int) -> None:
        """Makes a version the stable one."""
        self._write({"stable": str(number)})

    def found(
        self,
        versions: Iterable[VersionManifest],
        kept: Mapping[int, Sequence[Finding]],
        unsaved: Mapping[int, Finding] | None = None,
    ) -> Findings:
        """Returns the findings in `kept`, with the state of the files that they, or `unsaved` ones, depend on."""
        found = [*(unsaved or {}).items(), *((number, each) for number, known in kept.items() for each in known)]
        corrupt = {number for number, finding in found if finding.refusal == CORRUPT}
        files = {number: files_state(self._root / "versions" / str(number)) for number in corrupt}
        return Findings({version.version: version.digest for version in versions}, kept, files)

    def findings(self) -> dict[int, list[Finding]]:
        """Reads the findings about each version, by its number; ignores unreadable files."""
        findings: dict[int, list[Finding]] = {}
        for number, path in self._finding_files():
            try:
                text = _read(path)
                found = Finding(**typed(Finding, json.loads(text or "")))
            except (CorruptCheckpoint, ValueError, TypeError, KeyError, RecursionError):
                continue
            findings.setdefault(number, []).append(found)
        return findings

    def keep(self, number: int, finding: Finding) -> None:
        """Writes a finding about a version, and replaces the previous one on the same kind of device."""
        self._write(_file_of(number, finding))

    def roll_back(self, number: int, finding: Finding, policy: str | None = None) -> None:
        """Writes the finding that refuses a version, and the policy if there is one: both or neither."""
        self._write(_file_of(number, finding) | ({} if policy is None else {"policy": check_label(policy)}))

    def forget(self, number: int) -> None:
        """Removes the findings about a version, so that it is judged again."""
        with writing(self._root):
            for found, path in self._finding_files():
                if found == number:
                    path.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock on decisions inside the block."""
        with locked(self._root / "serving.lock"):
            yield

    def _finding_files(self) -> list[tuple[int, Path]]:
        """Returns the files of findings, each with the number of its version."""
        paths = children(self._folder / "findings")
        return [(int(match[1]), path) for path in paths if (match := _FINDING.fullmatch(path.name))]

    def _write(self, texts: Mapping[str, str]) -> None:
        paths = {self._folder / name: text for name, text in texts.items()}
        with writing(self._root):
            for path in paths:
                make_folder(path.parent, self._root)
            with self.held():
                replace_texts(paths)


def _file_of(number: int, finding: Finding) -> dict[str, str]:
    """Returns the name and the text of the file of a finding."""
    return {f"findings/{number}.{finding.device}.json": json.dumps(asdict(finding), indent=2)}


def _read(path: Path) -> str | None:
    """Returns the text of a file; None if there is no file."""
    try:
        if path.exists() and not path.is_file():
            raise CorruptCheckpoint(f"{path} cannot be read: it is not a file.")
        return path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}.") from error
