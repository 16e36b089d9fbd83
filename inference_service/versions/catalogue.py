"""The registry as a server sees it: versions, labels, and findings about versions."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from inference_service.metrics import InferenceMetrics
from inference_service.versions.planner import Seen, Version
from shared.errors import CorruptCheckpoint, FailedPrecondition, GptloopError, NotFound, StoreFailed, Unavailable, shown
from shared.registry import policy
from shared.registry.decisions import BestBy, Decided, check_label, pinned_number, run_of
from shared.registry.evaluations import Figures, one_of_each
from shared.registry.findings import CORRUPT, ROLLED_BACK, Finding, Findings
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from shared.service.log_ids import with_ids
from shared.version_format import WINDOWS_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Look:
    """The registry at one look, which began at `at`, in seconds since the epoch."""

    at: float = 0.0
    versions: list[VersionManifest] = field(default_factory=list)
    policy: str = "best"
    stable: int | None = None
    # What is wrong with the files that hold the policy and the stable version.
    damage: tuple[str, ...] = ()
    findings: Findings = field(default_factory=lambda: Findings({}, {}, {}))
    # All findings about each version, those that do not count among them.
    kept: Mapping[int, Sequence[Finding]] = field(default_factory=dict)
    # The files that versions lack, in a few words.
    lacking: Mapping[int, str] = field(default_factory=dict)
    # Why the manifests of versions cannot be read.
    damaged: Mapping[int, str] = field(default_factory=dict)
    # The versions that have no manifest yet, as while they are copied.
    unsealed: frozenset[int] = frozenset()
    # The figures of the evaluations of each version.
    figures: Mapping[int, Sequence[Figures]] = field(default_factory=dict)


class Catalogue:
    """The registry at the last look, and what this server found out since. `device` is the kind of device that judges
    versions, on a CPU with the format of weights.

    Belongs to the event loop; other threads read and write files.
    """

    def __init__(self, registry: Registry, device: str, metrics: InferenceMetrics) -> None:
        self._registry = registry
        self._device = device
        self._metrics = metrics
        self._last = _Look()
        self._findings = self._last.findings
        self._evaluated: Mapping[int, Figures] = {}
        self._looking = asyncio.Lock()
        # Why the last look failed; empty if it did not.
        self._unreachable = ""
        # Findings that are not written yet, or cannot be.
        self._unsaved: dict[int, Finding] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="findings")

    async def look(self) -> None:
        """Reads the registry; if that fails, everything stays as it was."""
        # One after another, or an older look could come last.
        async with self._looking:
            try:
                now = await asyncio.to_thread(self._read, dict(self._unsaved))
            except StoreFailed as error:
                if str(error) != self._unreachable:
                    self._unreachable = str(error)
                    logger.warning("%s", error)
                return
            self._unsaved = {
                number: finding for number, finding in self._unsaved.items() if finding not in now.kept.get(number, ())
            }
            # Once, and not at every look.
            for sentence in now.damage:
                if sentence not in self._last.damage:
                    logger.warning("%s", sentence)
            for _ in now.damaged.keys() - self._last.damaged.keys():
                self._metrics.refused(CORRUPT)
            self._unreachable = ""
            self._last = now
            self._evaluated = one_of_each(now.figures)
            self._metrics.evaluated(self._evaluated)
            self._findings = now.findings.adding(self._unsaved)

    def _read(self, unsaved: Mapping[int, Finding]) -> _Look:
        at = time.time()
        versions, decisions, last = self._registry.versions(), self._registry.decisions, self._last
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
        unsealed = self._registry.unsealed
        damaged = {number: why for number, why in self._registry.unreadable.items() if number not in unsealed}
        figures = self._registry.evaluations.of(versions)
        return _Look(at, versions, label, stable, tuple(damage), found, kept, lacking, damaged, unsealed, figures)

    # Versions and labels.

    @property
    def versions(self) -> list[VersionManifest]:
        """Every version, by ascending number."""
        return self._last.versions

    @property
    def damaged(self) -> Mapping[int, str]:
        """The versions whose manifest cannot be read, and why."""
        return self._last.damaged

    @property
    def unsealed(self) -> frozenset[int]:
        """The versions that have no manifest yet, as while they are copied."""
        return self._last.unsealed

    @property
    def notices(self) -> list[str]:
        """Sentences for an operator: decisions that cannot be read, and versions that do not compare with the best."""
        sentence = policy.describe_unranked(self.versions, self._decided())
        return [*self._last.damage, sentence] if sentence else list(self._last.damage)

    @property
    def looked_at(self) -> float:
        """When the last look began, in seconds since the epoch."""
        return self._last.at

    @property
    def policy(self) -> str:
        """The label whose version answers calls that name none."""
        return self._last.policy

    @property
    def best_by(self) -> BestBy:
        """What the label `best` compares."""
        return self._registry.best_by

    def evaluation(self, number: int) -> Figures | None:
        """Returns the figures of a version by the method of the newest evaluation of any version, else its newest."""
        return self._evaluated.get(number)

    async def manifest(self, number: int) -> VersionManifest:
        """Returns the manifest of a version; raises `NotFound`, or `CorruptCheckpoint` if it cannot be read.

        While the whole registry cannot be read, the last look counts; raises `Unavailable` for a version that it did
        not find.
        """
        try:
            return await asyncio.to_thread(self._registry.version, number)
        except StoreFailed as error:
            for manifest in self.versions:
                if manifest.version == number:
                    return manifest
            raise Unavailable(str(error)) from None

    async def resolve(self, label: str) -> VersionManifest | None:
        """Returns the version of a label, None for the one that serves by it.

        Raises `InvalidArgument` if it is not a label, `Unavailable` if there is no version at all, and `NotFound` if
        the label names none.
        """
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
        """Returns every label with the number of the version that it names."""
        return policy.labels(self.versions, self._decided())

    def seen(self, in_memory: Iterable[VersionManifest] = (), without: int | None = None) -> Seen:
        """Returns what the planner knows of the registry, and of the versions in memory, which may be gone from it; as
        if a version were refused if `without` names it."""
        decided = self._decided(without)
        deserving = [each for each in self.versions if each.version not in decided.refused]
        best = policy.ranking(deserving, decided)
        match self.policy:
            case "best":
                preferred = [each.version for each in best]
            case "latest":
                preferred = [each.version for each in reversed(deserving)]
            case label if (run := run_of(label)) is not None:
                preferred = [each.version for each in policy.ranking_of_run(deserving, run)]
            case label:
                preferred = [number] if (number := pinned_number(label) or self._last.stable) else []
        return Seen(
            eligible={each.version: self._judged(each, without) for each in deserving},
            preferred=tuple(preferred),
            fallback=tuple(each.version for each in [*best, *policy.ranking(deserving), *reversed(deserving)]),
            digests={each.version: each.digest for each in self.versions},
            refused=frozenset(each.digest for each in [*self.versions, *in_memory] if self._is_refused(each, without)),
            run=run_of(self.policy),
            # Evaluations have compared the versions already, on more text than a few windows.
            compares=self.policy == "latest"
            or run_of(self.policy) is not None
            or (self.policy == "best" and not policy.rated(deserving, decided)),
        )

    def _judged(self, manifest: VersionManifest, without: int | None) -> Version:
        finding = self.finding(manifest, without)
        # A version that lacks files sets no standard for others.
        loss = None if finding is None or manifest.version in self._last.lacking else finding.loss
        return as_version(manifest, loss)

    def _decided(self, without: int | None = None) -> Decided:
        refused = {each.version for each in self.versions if self._is_refused(each, without) or self.lacking(each)}
        return Decided(frozenset(refused), self._last.stable, self.policy, self.best_by, self._last.figures)

    def _is_refused(self, manifest: VersionManifest, without: int | None) -> bool:
        return manifest.version == without or self.refusal(manifest, without) is not None

    async def make_stable(self, number: int) -> None:
        """Makes a version the stable one; raises `NotFound`, and `FailedPrecondition` if it was refused."""
        await self.look()
        self.check_may_serve(await self.manifest(number))
        await asyncio.to_thread(self._registry.decisions.set_stable, number)
        # From now on nobody prunes it, but somebody may have just before.
        await self.manifest(number)
        await self.look()

    async def set_policy(self, label: str) -> None:
        """Lets the version of a label serve from now on; raises `InvalidArgument` if it is not a label, `NotFound` or
        `FailedPrecondition` if its version or run does not exist or was refused."""
        check_label(label)
        await self.look()
        number = pinned_number(label)
        run = run_of(label)
        if run is not None and policy.number_of(label, self.versions, self._decided()) is None:
            raise NotFound(f"No version that may serve is of the run {run!r}.")
        if label == "stable":
            number = self._last.stable
            if number is None:
                raise FailedPrecondition("No version is stable yet: promote one first.")
        if number is not None:
            self.check_may_serve(await self.manifest(number))
        await asyncio.to_thread(self._registry.decisions.set_policy, label)
        if number is not None:
            await self.manifest(number)
        await self.look()

    # Findings.

    def finding(self, manifest: VersionManifest, without: int | None = None) -> Finding | None:
        """Returns the finding that counts for a version on this kind of device; as if a version were refused if
        `without` names it."""
        findings = self._findings if without is None else self._findings.without(without)
        return findings.on(manifest.version, manifest.digest, self._device)

    def lacking(self, manifest: VersionManifest) -> str:
        """Returns a sentence on the files that a version lacks which was not examined yet: it is probably being copied.
        Empty for any other one."""
        what = self._last.lacking.get(manifest.version, "")
        if not what or self.finding(manifest) is not None:
            return ""
        return f"Version {manifest.version} waits for its files: {what}."

    def refusal(self, manifest: VersionManifest, without: int | None = None) -> Finding | None:
        """Returns why a version must not serve, None if it may; `without` as in `finding`."""
        finding = self.finding(manifest, without)
        return None if finding is None or finding.refusal is None else finding

    def check_may_serve(self, manifest: VersionManifest, without: int | None = None) -> None:
        """Raises `FailedPrecondition` if a version must not serve, and `Unavailable` if it lacks files."""
        if (refusal := self.refusal(manifest, without)) is not None:
            raise refused(manifest.version, refusal.sentence)
        if sentence := self.lacking(manifest):
            raise Unavailable(sentence)

    def accept(self, manifest: VersionManifest, loss: float, at: float | None = None) -> None:
        """Notes that a version may serve: in memory at once, in the registry a moment later.

        at: what was decided later counts; now by default, in seconds since the epoch.
        """
        self._note(manifest, Finding(manifest.digest, self._device, loss, None, "", time.time() if at is None else at))

    def refuse(
        self, manifest: VersionManifest, loss: float | None, reason: str, sentence: str, stands_on: str | None = None
    ) -> None:
        """Notes that a version must not serve, likewise."""
        self._note(manifest, Finding(manifest.digest, self._device, loss, reason, sentence, time.time(), stands_on))

    async def roll_back(self, manifest: VersionManifest, loss: float, sentence: str, label: str | None) -> None:
        """Refuses a version, and sets the policy to a label if there is one; returns when both are in the registry.

        Raises `FailedPrecondition` if the registry cannot be written; nothing has changed then.
        """
        finding = Finding(manifest.digest, self._device, loss, ROLLED_BACK, sentence, time.time())
        loop, decisions = asyncio.get_running_loop(), self._registry.decisions
        await loop.run_in_executor(self._writer, decisions.roll_back, manifest.version, finding, label)
        self._remember(manifest.version, finding)
        await self.look()

    def _note(self, manifest: VersionManifest, finding: Finding) -> None:
        self._remember(manifest.version, finding)
        self._writer.submit(self._save, manifest.version, finding)

    def _remember(self, number: int, finding: Finding) -> None:
        self._unsaved[number] = finding
        self._findings = self._last.findings.adding(self._unsaved)
        if finding.refusal is not None:
            self._metrics.refused(finding.refusal)
            logger.error(
                "version %d is refused, as %s: %s",
                *(number, finding.refusal, finding.sentence),
                extra=with_ids(version=number),
            )

    def _save(self, number: int, finding: Finding) -> None:
        try:
            self._registry.decisions.keep(number, finding)
        except GptloopError as error:
            logger.warning(
                "the finding about version %d is kept in memory only: %s", number, error, extra=with_ids(version=number)
            )


def as_version(manifest: VersionManifest, loss: float | None = None) -> Version:
    """Returns what the planner knows of a version."""
    windows = next((record.sha256 for record in manifest.files if record.name == WINDOWS_FILE), "")
    return Version(manifest.version, manifest.digest, manifest.run, manifest.evaluation_set, windows, loss)


def refused(number: int, clause: str) -> FailedPrecondition:
    """Returns the error for calls that ask for a version that must not serve."""
    return FailedPrecondition(f"Version {number} cannot serve: {clause}.")
