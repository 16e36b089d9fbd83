"""The registry as a server sees it: versions, labels, and what was found out about each version."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from inference_service.gate import Judged
from shared.errors import CorruptCheckpoint, FailedPrecondition, GptloopError, NotFound, Unavailable
from shared.registry import policy
from shared.registry.decisions import Decided, Finding, check_label, finding_on, pinned_number, run_of
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """The registry as it was when it was looked at."""

    versions: list[VersionManifest] = field(default_factory=list)
    policy: str = "best"
    stable: int | None = None
    findings: dict[int, list[Finding]] = field(default_factory=dict)
    # Versions whose manifest cannot be read, and why.
    unreadable: dict[int, str] = field(default_factory=dict)


class Catalogue:
    """A registry, read between two looks from memory. `device` is what versions are judged on here.

    Belongs to the event loop; files are read and written on other threads.
    """

    def __init__(self, registry: Registry, device: str) -> None:
        self._registry = registry
        self._device = device
        self._seen = _Seen()
        self._looking = asyncio.Lock()
        # What was found out and is not yet, or cannot be, written.
        self._unsaved: dict[int, Finding] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="findings")

    async def look(self) -> None:
        """Reads the registry; where that fails now, everything stays as it was."""
        # One after another, or an older look could come last.
        async with self._looking:
            try:
                seen = await asyncio.to_thread(self._read)
            except OSError as error:
                logger.warning("the registry cannot be read now: %s", error)
                return
            self._unsaved = {
                number: finding
                for number, finding in self._unsaved.items()
                if finding not in seen.findings.get(number, ())
            }
            self._seen = seen

    def _read(self) -> _Seen:
        versions, decisions, last = self._registry.versions(), self._registry.decisions, self._seen
        findings, unreadable = decisions.findings(), self._registry.unreadable
        try:
            return _Seen(versions, decisions.policy(), decisions.stable(), findings, unreadable)
        except CorruptCheckpoint as error:
            logger.warning("policy and stable version stay as they were: %s", error)
            return _Seen(versions, last.policy, last.stable, findings, unreadable)

    # Versions and labels.

    @property
    def versions(self) -> list[VersionManifest]:
        """Every version, by ascending number."""
        return self._seen.versions

    @property
    def unreadable(self) -> dict[int, str]:
        """The versions whose manifest cannot be read, and why."""
        return self._seen.unreadable

    @property
    def policy(self) -> str:
        """The label whose version serves those who name none."""
        return self._seen.policy

    async def manifest(self, number: int) -> VersionManifest:
        """The manifest of a version; raises `NotFound`, or `CorruptCheckpoint` where it cannot be read."""
        return await asyncio.to_thread(self._registry.version, number)

    async def resolve(self, label: str) -> VersionManifest | None:
        """The version of a label, None for the one that serves by it; raises `InvalidArgument` on what is no label,
        `Unavailable` while there is no version at all, and `NotFound` where the label names none."""
        check_label(label)
        await self.look()
        if not self.versions:
            raise Unavailable(f"The label {label!r} names no version yet: the registry is empty.")
        if label in ("best", "latest") and label == self.policy:
            return None
        number = pinned_number(label) or policy.number_of(label, self.versions, self._decided())
        if number is None:
            raise NotFound(f"No version has the label {label!r} now.")
        return await self.manifest(number)

    def labels(self) -> dict[str, int]:
        """Every label with the number of the version that it names."""
        return policy.labels(self.versions, self._decided())

    def _decided(self) -> Decided:
        refused = {manifest.version for manifest in self.versions} - {each.version for each in self._deserving()}
        return Decided(frozenset(refused), self._seen.stable, self.policy)

    def candidates(self, before: Sequence[int] | None) -> Iterator[VersionManifest]:
        """The versions that may serve, the one first that the policy wants.

        Where `before` are the versions that served, the last one last, these and then any others follow: they are
        better than nothing.
        """
        numbers = {manifest.version: manifest for manifest in self.versions}
        match self.policy:
            case "best":
                wanted = policy.ranking(self._deserving())
            case "latest":
                wanted = self.versions[::-1]
            case label if (run := run_of(label)) is not None:
                wanted = policy.ranking_of_run(self.versions, run)
            case label:
                number = pinned_number(label) or self._seen.stable
                wanted = [numbers[number]] if number in numbers else []
        if before is not None:
            served = [numbers[number] for number in reversed(before) if number in numbers]
            wanted = [*wanted, *served, *policy.ranking(self._deserving()), *self.versions[::-1]]
        for number in dict.fromkeys(manifest.version for manifest in wanted):
            if self.refusal(numbers[number]) is None:
                yield numbers[number]

    def _deserving(self) -> list[VersionManifest]:
        return [manifest for manifest in self.versions if self.refusal(manifest) is None]

    async def make_stable(self, number: int) -> None:
        """Makes a version the stable one; raises `NotFound`, and `FailedPrecondition` where it was refused."""
        await self.look()
        self.check_not_refused(await self.manifest(number))
        await asyncio.to_thread(self._registry.decisions.set_stable, number)
        # From now on nobody prunes it, but somebody may have just before.
        await self.manifest(number)
        await self.look()

    async def set_policy(self, label: str) -> None:
        """Lets the version of a label serve from now on; raises `InvalidArgument` on what is no label, `NotFound` or
        `FailedPrecondition` on one whose version or run does not exist or was refused."""
        check_label(label)
        await self.look()
        number = pinned_number(label)
        run = run_of(label)
        if run is not None and policy.number_of(label, self.versions, self._decided()) is None:
            raise NotFound(f"No version that may serve is of the run {run!r}.")
        if label == "stable":
            number = self._seen.stable
            if number is None:
                raise FailedPrecondition("No version is stable yet: promote one first.")
        if number is not None:
            self.check_not_refused(await self.manifest(number))
        await asyncio.to_thread(self._registry.decisions.set_policy, label)
        if number is not None:
            await self.manifest(number)
        await self.look()

    # What was found out.

    def finding(self, manifest: VersionManifest) -> Finding | None:
        """What was found out about a version as it is now, on this kind of device."""
        findings = self._seen.findings.get(manifest.version, [])
        unsaved = [finding for number, finding in self._unsaved.items() if number == manifest.version]
        return finding_on([*findings, *unsaved], manifest.digest, self._device)

    def refusal(self, manifest: VersionManifest) -> Finding | None:
        """Why a version must not serve; None where it may, for all that is known."""
        finding = self.finding(manifest)
        return finding if finding is not None and finding.refusal is not None else None

    def best_found(self, evaluation_set: str) -> Judged | None:
        """Of the versions that may serve and were judged on an evaluation set, the one that predicted its held-out
        windows best as it was served here; None where none was served."""
        judged = [
            Judged(manifest, finding.loss)
            for manifest in self._deserving()
            if manifest.evaluation_set == evaluation_set
            and (finding := self.finding(manifest)) is not None
            and finding.loss is not None
        ]
        return min(judged, key=lambda one: one.loss, default=None)

    def check_not_refused(self, manifest: VersionManifest) -> None:
        """Raises `FailedPrecondition` where a version must not serve."""
        if (refusal := self.refusal(manifest)) is not None:
            raise refused(manifest.version, refusal.sentence)

    def note(
        self, manifest: VersionManifest, loss: float | None, refusal: str | None = None, sentence: str = ""
    ) -> None:
        """Keeps what was found out about a version: in memory at once, in the registry a moment later."""
        finding = Finding(manifest.digest, self._device, loss, refusal, sentence, time.time())
        self._unsaved[manifest.version] = finding
        self._writer.submit(self._save, manifest.version, finding)

    def _save(self, number: int, finding: Finding) -> None:
        try:
            self._registry.decisions.keep(number, finding)
        except GptloopError as error:
            logger.warning("what was found out about version %d is kept in memory only: %s", number, error)


def refused(number: int, clause: str) -> FailedPrecondition:
    """The error of those who ask for a version that must not serve."""
    return FailedPrecondition(f"Version {number} cannot serve: {clause}.")
