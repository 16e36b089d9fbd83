"""The findings of servers about versions, and how long they count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

# A reason of refusals: the claimed loss differs from the measured one, or belongs to other windows.
LOSS_MISMATCH = "loss_mismatch"
# Reasons of refusals that do not depend on the version alone.
CORRUPT, WORSE, ROLLED_BACK = "corrupt", "worse", "rolled_back"
# Refusals for these reasons count on every kind of device.
_EVERYWHERE = frozenset({CORRUPT, "unfit", ROLLED_BACK})


@dataclass(frozen=True)
class Finding:
    """The result of a server's examination of a version, or of its serving.

    digest: the digest of the version's manifest.
    device: the kind of device that the server computes on; on a CPU also the format of weights, as in `cpu_int8`.
    loss: the loss on the version's held-out windows, in nats per token, or None if it was not measured.
    refusal: the reason why the version must not serve, as one word, or None if it may serve.
    sentence: the same reason as a sentence.
    at: the time, in seconds since the epoch.
    stands_on: a refusal counts only as long as this is valid: for `corrupt` the state of the version's files, otherwise
        the digest of the version that it was compared with, if any.
    """

    digest: str
    device: str
    loss: float | None
    refusal: str | None
    sentence: str
    at: float
    stands_on: str | None = None


class Findings:
    """The findings about the versions of a registry that still count.

    digests: the digests of the existing versions, by number.
    findings: all findings, by number.
    files: the state of the files of versions that were found corrupt.

    A refusal no longer counts if the better version that it stands on was removed or refused, or if the files have
    changed.
    """

    def __init__(
        self, digests: Mapping[int, str], findings: Mapping[int, Sequence[Finding]], files: Mapping[int, str]
    ) -> None:
        self._digests = digests
        self._numbers = {digest: number for number, digest in digests.items()}
        self._findings = findings
        self._files = files

    def adding(self, found: Mapping[int, Finding]) -> Self:
        """Returns these findings with newer ones; assumes unchanged files unless their state is known."""
        findings = {**self._findings}
        for number, finding in found.items():
            findings[number] = [*findings.get(number, ()), finding]
        files = {number: finding.stands_on for number, finding in found.items() if finding.stands_on is not None}
        return type(self)(self._digests, findings, {**files, **self._files})

    def without(self, number: int) -> Self:
        """Returns the findings as they count without a version."""
        digests = {each: digest for each, digest in self._digests.items() if each != number}
        return type(self)(digests, self._findings, self._files)

    def on(self, number: int, digest: str, device: str) -> Finding | None:
        """Returns the latest finding about a version that counts on a kind of device."""
        counting = [self._standing(number, finding) for finding in self._about(number, digest, device)]
        return max((each for each in counting if each is not None), key=lambda each: each.at, default=None)

    def refused_everywhere(self, number: int, digest: str) -> bool:
        """Returns whether a version is refused on every kind of device that has a finding about it."""
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
        """Returns a finding without a refusal that no longer counts; None if nothing is left of it."""
        if finding.refusal is None or self._stands(number, finding):
            return finding
        return None if finding.loss is None else replace(finding, refusal=None, sentence="", stands_on=None)

    def _stands(self, number: int, finding: Finding, refused: frozenset[int] = frozenset()) -> bool:
        """Returns whether a refusal counts; it does not if it depends on itself through the versions in `refused`."""
        if finding.refusal == CORRUPT:
            return finding.stands_on == self._files.get(number)
        if finding.stands_on is None:
            return finding.refusal != WORSE
        other = self._numbers.get(finding.stands_on)
        if other is None or other in refused:
            return False
        known = self._about(other, finding.stands_on, finding.device)
        last = max(known, key=lambda each: each.at, default=None)
        # A version that is worse than a worse version is worse too.
        return last is None or last.refusal in (None, WORSE) or not self._stands(other, last, refused | {number})
