"""Plans which version serves, which are loaded, and which leave memory. Plain Python over plain values.

`plan` promises, for a limit of at least 2 versions in memory:

- A refused version never begins to serve, and no call gets it. One that serves already is replaced as soon as another
  version is in memory.
- A version with streams is never dropped, nor is one that serves or is being loaded.
- The version that the policy prefers is loaded before any other. While it waits for room, only the serving version gets
  new streams, so it is loaded, at the latest, once the streams of the versions that are in memory, or are being loaded,
  have ended.
- Calls for other versions are served in their order.
- Once a plan that drops no held version is carried out, nothing is left to do until something else happens. After one
  that drops some, other plans may have to follow.
- A rollback never waits for room: the version that is to serve next is loaded at once, even beyond the limit. So is the
  successor of a serving version that is refused.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from shared.registry.findings import LOSS_MISMATCH, WORSE


class State(Enum):
    """The state of a version in this server.

    A `RESIDENT` one is in memory and answers the calls that name it. Two states are for listings only: a `WAITING` one
    waits for room in memory, or for its files, and a `REFUSED` one must not serve.
    """

    AVAILABLE = auto()
    WAITING = auto()
    LOADING = auto()
    RESIDENT = auto()
    SERVING = auto()
    REFUSED = auto()


@dataclass(frozen=True)
class Version:
    """A version. `loss` is that of its held-out windows as it was served here, in nats a token, None if unknown;
    `windows` is the digest of these windows, `digest` that of the manifest."""

    number: int
    digest: str
    run: str = ""
    evaluation_set: str = ""
    windows: str = ""
    loss: float | None = None


@dataclass(frozen=True)
class Seen:
    """The registry at the last look.

    `eligible` are the versions that may serve. The policy wants the `preferred` ones, the first one most; if none of
    them serves, a `fallback` is better than nothing. `digests` are those of all versions, by number, `refused` the
    digests of those that must not serve. The policy follows one `run`, or any if it is None; if it `compares`, a
    version must not be worse than the one that it replaces.
    """

    eligible: Mapping[int, Version]
    preferred: tuple[int, ...]
    fallback: tuple[int, ...]
    digests: Mapping[int, str]
    refused: frozenset[str] = frozenset()
    run: str | None = None
    compares: bool = True


@dataclass(frozen=True)
class Residency:
    """What this server does with a version.

    One that is `held` stays in memory for an operator while there is room; one that is `leaving` goes with its last
    stream. `used` and `served` order versions by when they were last used and last began to serve, 0 for never. It is
    not loaded before `retry_at`.
    """

    version: Version
    state: State = State.AVAILABLE
    streams: int = 0
    held: bool = False
    leaving: bool = False
    used: int = 0
    served: int = 0
    retry_at: float = 0.0

    @property
    def in_memory(self) -> bool:
        """Whether the version is ready to answer calls."""
        return self.state in (State.RESIDENT, State.SERVING)


@dataclass(frozen=True)
class Memory:
    """The versions that this server does something with, and how many of them fit into memory."""

    limit: int
    residencies: tuple[Residency, ...]

    @property
    def serving(self) -> Residency | None:
        """The version that answers calls that name none."""
        return next((each for each in self.residencies if each.state is State.SERVING), None)

    def postponed(self, now: float) -> set[int]:
        """Returns the numbers of the versions that could not be read, and are not tried again yet."""
        return {each.version.number for each in self.residencies if now < each.retry_at}


@dataclass(frozen=True)
class Wanted:
    """Calls that wait for a version. They fail if it is `refused`, unless one of them is to `hold` it, which asks for
    another examination. A version that is wanted `at_once` needs no room."""

    version: Version
    hold: bool = False
    at_once: bool = False
    refused: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a version in memory must not serve: the reason in a word, and a sentence. `stands_on` is the digest of the
    version that it was compared with."""

    version: Version
    reason: str
    sentence: str
    stands_on: str


@dataclass(frozen=True)
class Plan:
    """What to do: first refuse, then let a version `serve` (None: none), drop, load, and answer waiting calls.

    `awaited` is the version that should serve and is not in memory. Calls for the versions in `admit` go on, those for
    the ones in `reject` fail. The versions in `wait` have no room.
    """

    serve: int | None
    awaited: Version | None
    refuse: tuple[Refusal, ...] = ()
    drop: tuple[int, ...] = ()
    load: tuple[Version, ...] = ()
    admit: tuple[int, ...] = ()
    reject: tuple[int, ...] = ()
    wait: tuple[int, ...] = ()


def plan(seen: Seen, memory: Memory, wanted: Sequence[Wanted], now: float, margin: float) -> Plan:
    """Returns what to do now.

    `wanted` stands in the order in which the calls came. A version may be worse than the one it replaces by `margin`
    nats a token.
    """
    serving, awaited, refusals = _choose(seen, memory, now, margin)
    worse = {refusal.version.digest for refusal in refusals}
    refused = seen.refused | worse
    ready = {each.version.digest for each in memory.residencies if each.in_memory}
    room = _Room(memory, serving, seen.digests, refused)
    load: list[Version] = []
    admit: list[int] = []
    reject: list[int] = []
    left: list[Version] = []
    if awaited is not None:
        succeeds = serving is not None and serving.version.digest in refused
        asked = any(call.at_once and call.version.digest == awaited.digest for call in wanted)
        wanted = [Wanted(awaited, at_once=succeeds or asked), *wanted]
    for call in wanted:
        version = call.version
        # Calls are answered in their order, so none goes on while an earlier one has no room.
        in_turn = call.at_once or all(map(room.contains, left))
        if not call.hold and (call.refused or version.digest in worse):
            reject.append(version.number)
        elif in_turn and version.digest in ready and room.contains(version):
            room.keep(version.number)
            admit.append(version.number)
        elif in_turn and not room.contains(version) and room.take(version, call.at_once):
            load.append(version)
        else:
            left.append(version)
    room.tidy()
    return Plan(
        serve=None if serving is None else serving.version.number,
        awaited=awaited,
        refuse=tuple(refusals),
        drop=tuple(room.dropped),
        load=tuple(load),
        admit=tuple(admit),
        reject=tuple(reject),
        wait=tuple(dict.fromkeys(version.number for version in left if not room.contains(version))),
    )


def candidates(seen: Seen, memory: Memory, serving: Residency | None, now: float) -> list[Version]:
    """Returns the versions that may serve now, the best first.

    If the serving version may stay, these are the ones that the policy prefers; otherwise the versions that served
    before follow, and then any other.
    """
    numbers = [*seen.preferred]
    if serving is None or serving.version.digest in seen.refused:
        served = sorted((each for each in memory.residencies if each.served), key=lambda each: -each.served)
        numbers += [*(each.version.number for each in served), *seen.fallback]
    postponed = memory.postponed(now)
    return [
        version
        for number in dict.fromkeys(numbers)
        if (version := seen.eligible.get(number)) is not None
        and version.digest not in seen.refused
        and number not in postponed
    ]


def _choose(
    seen: Seen, memory: Memory, now: float, margin: float
) -> tuple[Residency | None, Version | None, list[Refusal]]:
    """Returns the version that serves from now on, a better one that is not in memory, and those that must not
    serve."""
    ready = {each.version.digest: each for each in memory.residencies if each.in_memory}
    serving = memory.serving
    if serving is not None and seen.digests.get(serving.version.number, serving.version.digest) not in ready:
        # Another registry has taken the place of the one before, and counts from 1 again.
        serving = None
    refusals: list[Refusal] = []
    while True:
        awaited, successor = None, None
        standards = _standards(seen, memory, serving, now)
        for version in candidates(seen, memory, serving, now):
            here = ready.get(version.digest)
            if here is None:
                awaited = awaited or version
            elif here is serving:
                break
            elif (refusal := _compare(here.version, standards, margin)) is None:
                successor = here
                break
            elif not here.held:
                # An operator who holds it can still pin it.
                refusals.append(refusal)
        if successor is None:
            return serving, awaited, refusals
        # A version that the policy prefers to this one may be good enough compared with it.
        serving = successor
        seen = replace(seen, refused=seen.refused | {refusal.version.digest for refusal in refusals})


def _standards(seen: Seen, memory: Memory, serving: Residency | None, now: float) -> list[Version]:
    """Returns the versions with which one that is to serve is compared."""
    if not seen.compares or (seen.run is not None and (serving is None or serving.version.run != seen.run)):
        return []
    if serving is not None:
        return [] if serving.version.digest in seen.refused else [serving.version]
    # After a restart: the versions that could serve now, and did before.
    postponed = memory.postponed(now)
    return [
        each
        for each in seen.eligible.values()
        if each.loss is not None and each.digest not in seen.refused and each.number not in postponed
    ]


def _compare(version: Version, standards: Sequence[Version], margin: float) -> Refusal | None:
    """Returns why a version must not serve, compared with the best of others on its evaluation set; None if it may."""
    others = [each for each in standards if each.evaluation_set == version.evaluation_set]
    if not others:
        return None
    best = min(others, key=_loss_of)
    if version.windows != best.windows:
        sentence = f"it names the evaluation set of version {best.number}, but has other held-out windows"
        return Refusal(version, LOSS_MISMATCH, sentence, best.digest)
    if _loss_of(version) > _loss_of(best) + margin:
        sentence = (
            f"its held-out loss is {_loss_of(version):.4f} nats a token, but that of version {best.number} is "
            f"{_loss_of(best):.4f}"
        )
        return Refusal(version, WORSE, sentence, best.digest)
    return None


def _loss_of(version: Version) -> float:
    assert version.loss is not None, "It was examined."
    return version.loss


class _Room:
    """Memory while a plan is made: the versions that are there, and those dropped to make room."""

    def __init__(
        self, memory: Memory, serving: Residency | None, digests: Mapping[int, str], refused: Collection[str]
    ) -> None:
        self.dropped: list[int] = []
        self._limit = memory.limit
        # The digests of the versions that are in memory or on their way, by number.
        self._used = {
            each.version.number: each.version.digest
            for each in memory.residencies
            if each.in_memory or each.state is State.LOADING
        }
        idle = [each for each in memory.residencies if each.in_memory and not each.streams and each is not serving]
        # No call can use these any more.
        self._over = {
            each.version.number
            for each in idle
            if each.leaving or digests.get(each.version.number) != each.version.digest or each.version.digest in refused
        }
        # They go first, then what was used longest ago, and what is held goes last. One that served was just used.
        idle.sort(
            key=lambda each: (each.version.number not in self._over, each.held, each.state is State.SERVING, each.used)
        )
        self._idle = [each.version.number for each in idle]

    def contains(self, version: Version) -> bool:
        """Whether a version is in memory or on its way."""
        return self._used.get(version.number) == version.digest

    def keep(self, number: int) -> None:
        """Keeps a version in memory."""
        if number in self._idle:
            self._idle.remove(number)

    def take(self, version: Version, at_once: bool) -> bool:
        """Reserves room for a version, for which idle ones are dropped; returns False if there is none."""
        number = version.number
        if number in self._idle:
            # One of another registry, with the same number, has to go first.
            self._drop(number)
        elif number in self._used:
            return False
        while len(self._used) >= self._limit and self._idle:
            self._drop(self._idle[0])
        if len(self._used) >= self._limit and not at_once:
            return False
        self._used[number] = version.digest
        return True

    def tidy(self) -> None:
        """Drops versions that no call can use any more, or for which there is no room."""
        for number in self._idle.copy():
            if number in self._over or len(self._used) > self._limit:
                self._drop(number)

    def _drop(self, number: int) -> None:
        self._idle.remove(number)
        del self._used[number]
        self.dropped.append(number)
