"""What servers found out about versions and what their operators decided: small files beside the versions.

serving/policy                      the label whose version serves those who name none; best where there is none
serving/stable                      the number of the stable version
serving/findings/<n>.<device>.json  what servers on a kind of device found out about a version
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.errors import CorruptCheckpoint, InvalidArgument, shown
from shared.registry.commit import locked, make_folder, replace_text, writing
from shared.registry.manifest import RUN_NAME, typed

LABELS = ("best", "latest", "stable")
_PINNED = "pinned:"
_RUN = "run:"
# A version's number as it is written.
_NUMBER = re.compile("[1-9][0-9]{0,17}")
_FINDING = re.compile(rf"({_NUMBER.pattern})\.[a-z0-9_]+\.json")
# What a refusal with such a reason says does not depend on what computes.
_EVERYWHERE = frozenset({"corrupt", "unfit", "rolled_back"})


@dataclass(frozen=True)
class Finding:
    """What a server found out about a version, before or while it served it.

    `digest` is that of the version's manifest, `device` what computed. `loss` is that of the carried windows in nats a
    token, as the version was served, None where it did not come so far. `refusal` says in a word why the version must
    not serve, None where it may, and `sentence` in a sentence. `at` is in seconds since the epoch.
    """

    digest: str
    device: str
    loss: float | None
    refusal: str | None
    sentence: str
    at: float


@dataclass(frozen=True)
class Decided:
    """The versions that must not serve, as far as is known, the stable one, and the label whose version serves."""

    refused: frozenset[int] = frozenset()
    stable: int | None = None
    policy: str = LABELS[0]


def finding_on(findings: Sequence[Finding], digest: str, device: str) -> Finding | None:
    """What was found out last about the version of a digest and counts on a kind of device."""
    counting = [
        finding
        for finding in findings
        if finding.digest == digest and (finding.device == device or finding.refusal in _EVERYWHERE)
    ]
    return max(counting, key=lambda finding: finding.at, default=None)


def is_refused_everywhere(findings: Sequence[Finding], digest: str) -> bool:
    """Whether the version of a digest must not serve on any kind of device of which something is known."""
    known = [finding_on(findings, digest, device) for device in {finding.device for finding in findings}]
    found = [finding for finding in known if finding is not None]
    return bool(found) and all(finding.refusal is not None for finding in found)


def check_label(label: str) -> str:
    """A label that can name a version; raises `InvalidArgument`."""
    pin, run = label.removeprefix(_PINNED), label.removeprefix(_RUN)
    if label in LABELS or (pin != label and _NUMBER.fullmatch(pin)) or (run != label and RUN_NAME.fullmatch(run)):
        return label
    raise InvalidArgument(
        f"{shown(label)} is no label: the labels are {', '.join(LABELS)}, {_RUN}<name> and {_PINNED}<version>."
    )


def pinned(number: int) -> str:
    """The label of a version that is to stay."""
    return f"{_PINNED}{number}"


def pinned_number(label: str) -> int | None:
    """The version of such a label; None for another one."""
    return int(label.removeprefix(_PINNED)) if label.startswith(_PINNED) else None


def run_label(run: str) -> str:
    """The label of the best version of a run."""
    return f"{_RUN}{run}"


def run_of(label: str) -> str | None:
    """The run of such a label; None for another one."""
    return label.removeprefix(_RUN) if label.startswith(_RUN) else None


class Decisions:
    """The files of one registry. What writes raises `FailedPrecondition` where the disk does not take it; what was
    decided and cannot be read, or understood, raises `CorruptCheckpoint`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "serving"

    def policy(self) -> str:
        """The label whose version serves those who name none."""
        try:
            return check_label(_read(self._folder / "policy") or LABELS[0])
        except InvalidArgument as error:
            raise CorruptCheckpoint(f"{self._folder / 'policy'} cannot be understood: {error}") from None

    def set_policy(self, label: str) -> None:
        """Lets the version of a label serve; raises `InvalidArgument` on what is none."""
        self._write("policy", check_label(label))

    def stable(self) -> int | None:
        """The number of the stable version, if there is one."""
        text = _read(self._folder / "stable")
        if text is not None and not _NUMBER.fullmatch(text):
            raise CorruptCheckpoint(f"{self._folder / 'stable'} cannot be understood: {text[:40]!r} is no version.")
        return None if text is None else int(text)

    def set_stable(self, number: int) -> None:
        """Makes a version the stable one."""
        self._write("stable", str(number))

    def findings(self) -> dict[int, list[Finding]]:
        """What was found out about each version, by its number; what cannot be read is found out again."""
        findings: dict[int, list[Finding]] = {}
        for path in self._finding_files():
            try:
                text = _read(path)
                found = Finding(**typed(Finding, json.loads(text or "")))
            except (CorruptCheckpoint, ValueError, TypeError, KeyError, RecursionError):
                continue
            findings.setdefault(_number_of(path), []).append(found)
        return findings

    def keep(self, number: int, finding: Finding) -> None:
        """Keeps what was found out about a version, in the place of what was found out before on the same device."""
        self._write(f"findings/{number}.{finding.device}.json", json.dumps(asdict(finding), indent=2))

    def forget(self, number: int) -> None:
        """Lets a version be judged anew."""
        with writing(self._root):
            for path in self._finding_files():
                if _number_of(path) == number:
                    path.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile nobody decides anything."""
        with locked(self._root / "serving.lock"):
            yield

    def _finding_files(self) -> list[Path]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return [path for path in (self._folder / "findings").iterdir() if _FINDING.fullmatch(path.name)]
        return []

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        with writing(self._root):
            make_folder(path.parent, self._root)
            with self.held():
                replace_text(path, text)


def _number_of(finding: Path) -> int:
    return int(finding.name.partition(".")[0])


def _read(path: Path) -> str | None:
    """What a file holds; None where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}.") from error
