"""What servers found out about versions, and how long it stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

# Reasons of refusals that other things than the version decide.
CORRUPT, WORSE, ROLLED_BACK = "corrupt", "worse", "rolled_back"
# What a refusal with such a reason says does not depend on what computes.
_EVERYWHERE = frozenset({CORRUPT, "unfit", ROLLED_BACK})


@dataclass(frozen=True)
class Finding:
    """What a server found out about a version, before or while it served it.

    `digest` is that of the version's manifest, `device` what computed. `loss` is that of the carried windows in nats a
    token, as the version was served, None where it did not come so far. `refusal` says in a word why the version must
    not serve, None where it may, and `sentence` in a sentence. `at` is in seconds since the epoch.

    `stands_on` is what a refusal needs in order to count: for `corrupt` the state of the version's files, else the
    digest of the version with which it was compared, None for neither.
    """

    digest: str
    device: str
    loss: float | None
    refusal: str | None
    sentence: str
    at: float
    stands_on: str | None = None


class Findings:
    """What was found out about the versions of a registry, as far as it still stands.

    `digests` are those of the versions that are there, `findings` what was found out about each number, and `files` the
    state of the files of those that were found corrupt. A refusal lapses when what it stands on is gone: the version
    that was better was removed or refused itself, or the files have changed.
    """

    def __init__(
        self, digests: Mapping[int, str], findings: Mapping[int, Sequence[Finding]], files: Mapping[int, str]
    ) -> None:
        self._digests = digests
        self._numbers = {digest: number for number, digest in digests.items()}
        self._findings = findings
        self._files = files

    def adding(self, found: Mapping[int, Finding]) -> Self:
        """These and what was found out since, whose files are taken for unchanged unless their state is known."""
        findings = {**self._findings}
        for number, finding in found.items():
            findings[number] = [*findings.get(number, ()), finding]
        files = {number: finding.stands_on for number, finding in found.items() if finding.stands_on is not None}
        return type(self)(self._digests, findings, {**files, **self._files})

    def without(self, number: int) -> Self:
        """These as if a version were not there any more."""
        digests = {each: digest for each, digest in self._digests.items() if each != number}
        return type(self)(digests, self._findings, self._files)

    def on(self, number: int, digest: str, device: str) -> Finding | None:
        """What was found out last about a version and counts on a kind of device."""
        counting = [self._standing(number, finding) for finding in self._about(number, digest, device)]
        return max((each for each in counting if each is not None), key=lambda each: each.at, default=None)

    def refused_everywhere(self, number: int, digest: str) -> bool:
        """Whether a version must not serve on any kind of device of which something is known."""
        devices = {finding.device for finding in self._findings.get(number, ())}
        known = [found for device in devices if (found := self.on(number, digest, device)) is not None]
        return bool(known) and all(finding.refusal is not None for finding in known)

    def _about(self, number: int, digest: str, device: str) -> list[Finding]:
        return [
            finding
            for finding in self._findings.get(number, ())
            if finding.digest == digest and (finding.device == device or finding.refusal in _EVERYWHERE)
        ]

    def _standing(self, number: int, finding: Finding) -> Finding | None:
        """A finding without a refusal that has lapsed; None if nothing of it is left."""
        if finding.refusal is None or self._stands(number, finding):
            return finding
        return None if finding.loss is None else replace(finding, refusal=None, sentence="", stands_on=None)

    def _stands(self, number: int, finding: Finding, refused: frozenset[int] = frozenset()) -> bool:
        """Whether a refusal counts; not if it stands on itself in the end, through others that are `refused` by it."""
        if finding.refusal == CORRUPT:
            return finding.stands_on == self._files.get(number)
        if finding.stands_on is None:
            return finding.refusal != WORSE
        other = self._numbers.get(finding.stands_on)
        if other is None or other in refused:
            return False
        known = self._about(other, finding.stands_on, finding.device)
        last = max(known, key=lambda each: each.at, default=None)
        # What is worse than a version that is worse itself is worse still.
        return last is None or last.refusal in (None, WORSE) or not self._stands(other, last, refused | {number})
