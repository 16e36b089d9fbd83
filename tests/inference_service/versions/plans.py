"""Made-up worlds for the tests of the planner: no model, disk or clock."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from inference_service.versions.planner import (
    Memory,
    Plan,
    Residency,
    Seen,
    State,
    Version,
    Wanted,
    plan,
)

NOW, MARGIN = 100.0, 0.05
NUMBERS = range(1, 7)


@dataclass(frozen=True)
class World:
    """All that a plan depends on."""

    seen: Seen
    memory: Memory
    wanted: tuple[Wanted, ...] = ()

    def plan(self) -> Plan:
        return plan(self.seen, self.memory, self.wanted, NOW, MARGIN)

    def residency(self, number: int) -> Residency | None:
        return next((each for each in self.memory.residencies if each.version.number == number), None)

    def changed(self, number: int, **changes: Any) -> "World":
        residency = self.residency(number) or Residency(Version(number, f"digest {number}"))
        others = tuple(each for each in self.memory.residencies if each.version.number != number)
        return replace(self, memory=replace(self.memory, residencies=(*others, replace(residency, **changes))))

    def carried_out(self, plan: Plan) -> "World":
        """The world in which a plan was carried out."""
        worse = {refusal.version.digest for refusal in plan.refuse}
        eligible = {number: each for number, each in self.seen.eligible.items() if each.digest not in worse}
        world = replace(self, seen=replace(self.seen, eligible=eligible, refused=self.seen.refused | worse))
        order = 1 + max((each.used for each in self.memory.residencies), default=0)
        before = self.memory.serving
        if before is not None and before.version.number != plan.serve:
            world = world.changed(before.version.number, state=State.RESIDENT, used=order)
        if plan.serve is not None:
            world = world.changed(plan.serve, state=State.SERVING, served=order)
        for number in plan.drop:
            world = world.changed(number, state=State.AVAILABLE, held=False, leaving=False)
        for version in plan.load:
            world = world.changed(version.number, version=version, state=State.LOADING)
        for call in self.wanted:
            if call.version.number in plan.admit:
                world = world.answered(call)
        gone = {*plan.admit, *plan.reject}
        return replace(world, wanted=tuple(call for call in self.wanted if call.version.number not in gone))

    def answered(self, call: Wanted) -> "World":
        residency = self.residency(call.version.number)
        assert residency is not None and residency.in_memory
        held, leaving = (True, False) if call.hold else (residency.held, residency.leaving)
        return self.changed(call.version.number, streams=residency.streams + 1, held=held, leaving=leaving)

    def loaded(self) -> "World":
        """The world in which every load has ended, and the calls that waited for it are answered."""
        world = self
        for each in self.memory.residencies:
            if each.state is State.LOADING:
                version = each.version if each.version.loss is not None else replace(each.version, loss=3.0)
                world = world.changed(version.number, version=version, state=State.RESIDENT)
                calls = [call for call in world.wanted if call.version.digest == version.digest]
                for call in calls:
                    world = world.answered(call)
                world = replace(world, wanted=tuple(call for call in world.wanted if call not in calls))
        return world

    def drained(self) -> "World":
        """The world in which the streams of all versions have ended that the next plan does not let serve."""
        world, serve = self, self.plan().serve
        for each in self.memory.residencies:
            if each.version.number != serve:
                world = world.changed(each.version.number, streams=0)
        return world


def version(number: int, loss: float | None = 3.0, **values: Any) -> Version:
    return Version(number, f"digest {number}", "run", "set", "windows", loss, **values)


def registry(preferred: Sequence[int], refused: Sequence[int] = (), **values: Any) -> Seen:
    """A registry of versions that are equally good; the policy prefers some of them, and some are refused."""
    return Seen(
        eligible={number: version(number) for number in NUMBERS if number not in refused},
        preferred=tuple(preferred),
        fallback=tuple(reversed(NUMBERS)),
        digests={number: f"digest {number}" for number in NUMBERS},
        refused=frozenset(f"digest {number}" for number in refused),
        **values,
    )


def resident(number: int, state: State = State.RESIDENT, streams: int = 0, **values: Any) -> Residency:
    return Residency(version(number), state, streams, **{"used": number, **values})


def serving(number: int, **values: Any) -> Residency:
    return resident(number, State.SERVING, **values)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any world, also one in which another registry took the place of the one before."""
    made = {
        number: Version(
            number,
            f"digest {number}",
            run=draw(st.sampled_from(["one run", "another run"])),
            evaluation_set=draw(st.sampled_from(["a set", "another set"])),
            windows=draw(st.sampled_from(["windows", "windows", "windows", "other windows"])),
            loss=draw(st.sampled_from([2.9, 3.0, 3.04, 3.08, 3.2])),
        )
        for number in NUMBERS
    }
    some = st.sets(st.sampled_from(NUMBERS))
    in_use, refused, gone = draw(st.sets(st.sampled_from(NUMBERS), max_size=5)), draw(some), draw(some)
    replaced = draw(st.sets(st.sampled_from(NUMBERS), max_size=1))
    orders = dict(zip(NUMBERS, draw(st.permutations(NUMBERS)), strict=True))
    serves = draw(st.sampled_from([None, *in_use]))
    residencies = []
    for number in in_use:
        state = State.SERVING if number == serves else draw(st.sampled_from([State.RESIDENT, State.LOADING]))
        if state is not State.SERVING and draw(st.integers(0, 4)) == 0:
            state = State.AVAILABLE
        in_memory = state in (State.RESIDENT, State.SERVING)
        residencies.append(
            Residency(
                made[number],
                state,
                streams=draw(st.integers(0, 2)) if in_memory else 0,
                held=in_memory and draw(st.booleans()),
                leaving=in_memory and draw(st.integers(0, 3)) == 0,
                used=orders[number],
                served=orders[number] if draw(st.booleans()) else 0,
                retry_at=NOW + 1 if state is State.AVAILABLE and draw(st.booleans()) else 0.0,
            )
        )
    present = {
        number: replace(made[number], digest=f"another digest {number}") if number in replaced else made[number]
        for number in NUMBERS
        if number not in gone
    }
    digests = frozenset(f"digest {number}" for number in refused)
    lacking = draw(some)
    seen = Seen(
        eligible={
            number: each if draw(st.booleans()) else replace(each, loss=None)
            for number, each in present.items()
            if each.digest not in digests and number not in lacking
        },
        preferred=tuple(draw(st.lists(st.sampled_from(NUMBERS), unique=True))),
        fallback=tuple(draw(st.permutations(NUMBERS))),
        digests={number: each.digest for number, each in present.items()},
        refused=digests,
        run=draw(st.sampled_from([None, "one run"])),
        compares=draw(st.booleans()),
    )
    wanted = draw(calls(tuple(present.values()), digests))
    return World(seen, Memory(draw(st.integers(2, 4)), tuple(residencies)), wanted)


@st.composite
def calls(draw: st.DrawFn, versions: Sequence[Version], refused: frozenset[str]) -> tuple[Wanted, ...]:
    if not versions:
        return ()
    chosen = draw(st.lists(st.sampled_from(versions), unique_by=lambda each: each.number, max_size=4))
    return tuple(
        Wanted(
            each,
            hold=draw(st.integers(0, 3)) == 0,
            at_once=draw(st.integers(0, 3)) == 0,
            refused=each.digest in refused,
        )
        for each in chosen
    )


@st.composite
def crowded_worlds(draw: st.DrawFn) -> tuple[Version, World]:
    """A version that the policy prefers, and a world in which busy versions leave no room for it."""
    best, serves, *others = draw(st.permutations(NUMBERS))
    limit = draw(st.integers(2, 4))
    there = [serving(serves, streams=draw(st.integers(0, 2)))]
    for number in others[: limit - 1]:
        busy = draw(st.booleans())
        there.append(resident(number, streams=draw(st.integers(1, 2))) if busy else resident(number, State.LOADING))
    seen = registry([best, *draw(st.permutations([serves, *others]))])
    wanted = draw(calls(tuple(map(version, others)), frozenset()))
    return version(best), World(seen, Memory(limit, tuple(there)), wanted)
