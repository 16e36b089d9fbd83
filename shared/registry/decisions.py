"""Decisions of operators and findings of servers, in texts beside the versions.

serving/policy                      the label of the version that serves by default; `best` if there is none
serving/stable                      the number of the stable version
serving/findings/<n>.<device>.json  the finding about a version on a kind of device
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from shared.errors import CorruptCheckpoint, InvalidArgument, shown
from shared.registry.evaluations import Figures
from shared.registry.findings import CORRUPT, Finding, Findings
from shared.registry.manifest import RUN_NAME, VersionManifest, typed
from shared.registry.numbering import NUMBER, is_number
from shared.registry.store import Store, Texts

LABELS = ("best", "latest", "stable")
_PINNED = "pinned:"
_RUN = "run:"
_GROUP = "serving"
_FINDING = re.compile(rf"findings/({NUMBER.pattern})\.[a-z0-9_]+\.json")


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

    Methods that write raise `FailedPrecondition` if the store fails. Methods that read a decision raise
    `CorruptCheckpoint` if it is unreadable or invalid.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def policy(self) -> str:
        """Returns the label of the version that serves by default."""
        try:
            return check_label(self._read("policy") or LABELS[0])
        except InvalidArgument as error:
            place = self._store.place(f"{_GROUP}/policy")
            raise CorruptCheckpoint(f"{place} cannot be understood: {error}") from None

    def set_policy(self, label: str) -> None:
        """Makes the version of a label serve by default; raises `InvalidArgument` if it is not a label."""
        self._write({"policy": check_label(label)})

    def stable(self) -> int | None:
        """Returns the number of the stable version, if there is one."""
        text = self._read("stable")
        if text is not None and not is_number(text):
            place = self._store.place(f"{_GROUP}/stable")
            raise CorruptCheckpoint(f"{place} cannot be understood: {shown(text)} is not a version.")
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
        files = {number: self._store.state(f"versions/{number}") for number in corrupt}
        return Findings({version.version: version.digest for version in versions}, kept, files)

    def findings(self) -> dict[int, list[Finding]]:
        """Reads the findings about each version, by its number; ignores unreadable ones."""
        findings: dict[int, list[Finding]] = {}
        texts = self._store.read(_GROUP)
        for number, name in _finding_names(texts):
            if (found := _finding_in(texts, name)) is not None:
                findings.setdefault(number, []).append(found)
        return findings

    def keep(self, number: int, finding: Finding) -> None:
        """Writes a finding about a version instead of the one on the same kind of device, unless that one is newer."""
        ((name, text),) = _text_of(number, finding).items()

        def change(texts: Texts) -> Mapping[str, str]:
            before = _finding_in(texts, name)
            is_newer = before is not None and before.digest == finding.digest and before.at > finding.at
            return {} if is_newer else {name: text}

        self._store.change(_GROUP, change)

    def roll_back(self, number: int, finding: Finding, policy: str | None = None) -> None:
        """Writes the finding that refuses a version, and the policy if there is one: both or neither."""
        self._write(_text_of(number, finding) | ({} if policy is None else {"policy": check_label(policy)}))

    def forget(self, number: int) -> None:
        """Removes the findings about a version, so that it is judged again."""

        def change(texts: Texts) -> Mapping[str, None]:
            return {name: None for found, name in _finding_names(texts) if found == number}

        if change(self._store.read(_GROUP)):
            self._store.change(_GROUP, change)

    def _read(self, name: str) -> str | None:
        text = self._store.read(_GROUP).get(name)
        return None if text is None else text.strip()

    def _write(self, texts: Mapping[str, str]) -> None:
        self._store.change(_GROUP, lambda _: texts)


def _finding_names(texts: Texts) -> list[tuple[int, str]]:
    """Returns the names of findings, each with the number of its version."""
    return [(int(match[1]), name) for name in texts if (match := _FINDING.fullmatch(name))]


def _finding_in(texts: Texts, name: str) -> Finding | None:
    """Returns the finding in a text; None if there is none, or if it cannot be read."""
    try:
        return Finding(**typed(Finding, json.loads(texts.get(name, ""))))
    except (CorruptCheckpoint, ValueError, TypeError, KeyError, RecursionError):
        return None


def _text_of(number: int, finding: Finding) -> dict[str, str]:
    """Returns the name and the text of a finding."""
    return {f"findings/{number}.{finding.device}.json": json.dumps(asdict(finding), indent=2)}
