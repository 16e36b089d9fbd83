"""The registry as a server sees it: versions, labels, and what was found out about each version."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from inference_service.versions.gate import Judged
from shared.errors import CorruptCheckpoint, FailedPrecondition, GptloopError, NotFound, Unavailable, shown
from shared.registry import policy
from shared.registry.decisions import Decided, check_label, pinned_number, run_of
from shared.registry.findings import ROLLED_BACK, Finding, Findings
from shared.registry.manifest import MANIFEST_NAME, VersionManifest
from shared.registry.store import Registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """The registry as it was when it was looked at."""

    versions: list[VersionManifest] = field(default_factory=list)
    policy: str = "best"
    stable: int | None = None
    # What is wrong with the files that hold the policy and the stable version.
    damage: tuple[str, ...] = ()
    findings: Findings = field(default_factory=lambda: Findings({}, {}, {}))
    # What was kept of each version, whether or not it stands.
    kept: Mapping[int, Sequence[Finding]] = field(default_factory=dict)
    # Versions that lack files, and which.
    lacking: Mapping[int, str] = field(default_factory=dict)
    # Versions whose manifest cannot be read, and why.
    unreadable: Mapping[int, str] = field(default_factory=dict)
    # Those of them that have none yet.
    unsealed: frozenset[int] = frozenset()


class Catalogue:
    """A registry, read between two looks from memory. `device` is what versions are judged on here.

    Belongs to the event loop; files are read and written on other threads.
    """

    def __init__(self, registry: Registry, device: str) -> None:
        self._registry = registry
        self._device = device
        self._seen = _Seen()
        self._findings = self._seen.findings
        self._looking = asyncio.Lock()
        # Why the last look failed, if it did.
        self._unreachable = ""
        # What was found out and is not yet, or cannot be, written.
        self._unsaved: dict[int, Finding] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="findings")

    async def look(self) -> None:
        """Reads the registry; where that fails now, everything stays as it was."""
        # One after another, or an older look could come last.
        async with self._looking:
            try:
                seen = await asyncio.to_thread(self._read, dict(self._unsaved))
            except OSError as error:
                if str(error) != self._unreachable:
                    self._unreachable = str(error)
                    logger.warning("the registry cannot be read now: %s", error)
                return
            self._unsaved = {
                number: finding for number, finding in self._unsaved.items() if finding not in seen.kept.get(number, ())
            }
            for sentence in seen.damage:
                # Once, and not at every look.
                if sentence not in self._seen.damage:
                    logger.warning("%s", sentence)
            self._unreachable = ""
            self._seen = seen
            self._findings = seen.findings.adding(self._unsaved)

    def _read(self, unsaved: Mapping[int, Finding]) -> _Seen:
        versions, decisions, last = self._registry.versions(), self._registry.decisions, self._seen
        kept = decisions.findings()
        found = decisions.found(versions, kept, unsaved)
        lacking = {each.version: what for each in versions if (what := self._registry.lacking(each))}
        damage = []
        try:
            label = decisions.policy()
        except CorruptCheckpoint as error:
            label = last.policy
            damage.append(f"The policy stays {label}: {error}")
        try:
            stable = decisions.stable()
        except CorruptCheckpoint as error:
            stable = last.stable
            damage.append(f"The stable version stays as it was: {error}")
        unreadable = self._registry.unreadable
        unsealed = frozenset(
            number
            for number in unreadable
            if not os.path.lexists(self._registry.version_directory(number) / MANIFEST_NAME)
        )
        return _Seen(versions, label, stable, tuple(damage), found, kept, lacking, unreadable, unsealed)

    # Versions and labels.

    @property
    def versions(self) -> list[VersionManifest]:
        """Every version, by ascending number."""
        return self._seen.versions

    @property
    def unreadable(self) -> Mapping[int, str]:
        """The versions whose manifest cannot be read, and why."""
        return self._seen.unreadable

    @property
    def unsealed(self) -> frozenset[int]:
        """Those of them that have no manifest yet, as while they are copied."""
        return self._seen.unsealed

    @property
    def notices(self) -> list[str]:
        """What an operator should know: decisions that cannot be read, and versions that do not compare with the best
        one."""
        sentence = policy.describe_other_text(self.versions, self._decided().refused)
        return [*self._seen.damage, sentence] if sentence else list(self._seen.damage)

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
            raise NotFound(f"No version has the label {shown(label)} now.")
        return await self.manifest(number)

    def labels(self) -> dict[str, int]:
        """Every label with the number of the version that it names."""
        return policy.labels(self.versions, self._decided())

    def _decided(self) -> Decided:
        refused = {manifest.version for manifest in self.versions} - {each.version for each in self._deserving()}
        return Decided(frozenset(refused), self._seen.stable, self.policy)

    def candidates(self, before: Sequence[int] | None, without: int | None = None) -> Iterator[VersionManifest]:
        """The versions that may serve, the one first that the policy wants; as if one were refused if `without` names
        it.

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
            if number != without and self._may_serve(numbers[number], without):
                yield numbers[number]

    def _may_serve(self, manifest: VersionManifest, without: int | None = None) -> bool:
        return self.refusal(manifest, without) is None and not self.lacking(manifest)

    def _deserving(self) -> list[VersionManifest]:
        return [manifest for manifest in self.versions if self._may_serve(manifest)]

    async def make_stable(self, number: int) -> None:
        """Makes a version the stable one; raises `NotFound`, and `FailedPrecondition` where it was refused."""
        await self.look()
        self.check_may_serve(await self.manifest(number))
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
            self.check_may_serve(await self.manifest(number))
        await asyncio.to_thread(self._registry.decisions.set_policy, label)
        if number is not None:
            await self.manifest(number)
        await self.look()

    # What was found out.

    def finding(self, manifest: VersionManifest, without: int | None = None) -> Finding | None:
        """What was found out about a version as it is now, on this kind of device; as if one were refused if `without`
        names it."""
        findings = self._findings if without is None else self._findings.without(without)
        return findings.on(manifest.version, manifest.digest, self._device)

    def lacking(self, manifest: VersionManifest) -> str:
        """What files a version lacks that was not examined yet, in a sentence: it is probably being copied. Empty for
        any other one."""
        what = self._seen.lacking.get(manifest.version, "")
        if not what or self.finding(manifest) is not None:
            return ""
        return f"Version {manifest.version} waits for its files: {what}."

    def refusal(self, manifest: VersionManifest, without: int | None = None) -> Finding | None:
        """Why a version must not serve; None where it may, for all that is known. `without` as in `finding`."""
        finding = self.finding(manifest, without)
        return finding if finding is not None and finding.refusal is not None else None

    def best_found(self, evaluation_set: str, unread: Callable[[int], bool]) -> Judged | None:
        """Of the versions that could serve now and were judged on an evaluation set, the one that predicted its
        held-out windows best as it was served here; None if none was served. `unread` says which could not be read."""
        judged = [
            Judged(manifest, finding.loss)
            for manifest in self._deserving()
            if manifest.evaluation_set == evaluation_set
            and manifest.version not in self._seen.lacking
            and not unread(manifest.version)
            and (finding := self.finding(manifest)) is not None
            and finding.loss is not None
        ]
        return min(judged, key=lambda one: one.loss, default=None)

    def check_may_serve(self, manifest: VersionManifest, without: int | None = None) -> None:
        """Raises `FailedPrecondition` if a version must not serve, and `Unavailable` while it lacks files."""
        if (refusal := self.refusal(manifest, without)) is not None:
            raise refused(manifest.version, refusal.sentence)
        if sentence := self.lacking(manifest):
            raise Unavailable(sentence)

    def note(
        self,
        manifest: VersionManifest,
        loss: float | None,
        refusal: str | None = None,
        sentence: str = "",
        stands_on: str | None = None,
    ) -> None:
        """Keeps what was found out about a version: in memory at once, in the registry a moment later."""
        finding = Finding(manifest.digest, self._device, loss, refusal, sentence, time.time(), stands_on)
        self._remember(manifest, finding)
        self._writer.submit(self._save, manifest.version, finding)

    async def roll_back(self, manifest: VersionManifest, loss: float, sentence: str, label: str | None) -> None:
        """Refuses a version, and lets that of a label serve if there is one; returns when both are in the registry.

        Raises `FailedPrecondition` if the registry cannot be written; nothing has changed then.
        """
        finding = Finding(manifest.digest, self._device, loss, ROLLED_BACK, sentence, time.time())
        loop, decisions = asyncio.get_running_loop(), self._registry.decisions
        await loop.run_in_executor(self._writer, decisions.roll_back, manifest.version, finding, label)
        self._remember(manifest, finding)
        await self.look()

    def _remember(self, manifest: VersionManifest, finding: Finding) -> None:
        self._unsaved[manifest.version] = finding
        self._findings = self._seen.findings.adding(self._unsaved)

    def _save(self, number: int, finding: Finding) -> None:
        try:
            self._registry.decisions.keep(number, finding)
        except GptloopError as error:
            logger.warning("what was found out about version %d is kept in memory only: %s", number, error)


def refused(number: int, clause: str) -> FailedPrecondition:
    """The error of those who ask for a version that must not serve."""
    return FailedPrecondition(f"Version {number} cannot serve: {clause}.")
