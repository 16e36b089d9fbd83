"""What the planner promises, over made-up versions: no model, disk or clock."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service.versions.planner import (
    Memory,
    Plan,
    Residency,
    Seen,
    State,
    Version,
    Wanted,
    candidates,
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
        worse = {refusal.digest for refusal in plan.refuse}
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
        """The world in which the streams of all versions have ended that do not serve."""
        world = self
        for each in self.memory.residencies:
            if each.state is not State.SERVING:
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


@given(worlds())
def test_a_refused_version_neither_begins_to_serve_nor_answers_calls(world: World) -> None:
    done = world.plan()
    refused = world.seen.refused | {refusal.digest for refusal in done.refuse}
    before = world.memory.serving
    if done.serve is not None and (before is None or done.serve != before.version.number):
        chosen = world.residency(done.serve)
        assert chosen is not None and chosen.in_memory
        assert chosen.version.digest not in refused
        assert world.seen.eligible[done.serve].digest == chosen.version.digest
    for call in world.wanted:
        if call.version.digest in refused and not call.hold:
            assert call.version.number not in done.admit
            assert call.version.number in done.reject
    assert not {each.digest for each in done.load if each.digest in refused} - {
        call.version.digest for call in world.wanted if call.hold
    }


@given(worlds())
def test_a_serving_version_that_is_refused_is_replaced_as_soon_as_another_one_is_in_memory(world: World) -> None:
    before = world.memory.serving
    if before is None or before.version.digest not in world.seen.refused:
        return
    done = world.plan()
    ready = {each.version.digest for each in world.memory.residencies if each.in_memory}
    others = [each for each in candidates(world.seen, world.memory, NOW) if each.digest in ready]
    if others:
        assert done.serve != before.version.number
    elif done.awaited is not None and done.serve is not None and world.residency(done.awaited.number) is None:
        after = world.carried_out(done).residency(done.awaited.number)
        assert after is not None and after.state is State.LOADING


@given(worlds())
def test_a_version_that_serves_has_streams_or_is_being_loaded_is_not_dropped(world: World) -> None:
    done = world.plan()
    assert len(set(done.drop)) == len(done.drop)
    for number in done.drop:
        residency = world.residency(number)
        assert residency is not None and residency.in_memory
        assert residency.streams == 0
        assert number != done.serve and number not in done.admit


@given(worlds())
def test_beyond_the_limit_only_urgent_versions_are_loaded_and_no_idle_one_stays(world: World) -> None:
    done = world.plan()
    before = world.memory.serving
    urgent = any(call.at_once for call in world.wanted)
    urgent = urgent or (before is not None and before.version.digest in world.seen.refused)
    after = world.carried_out(done)
    used = [each for each in after.memory.residencies if each.in_memory or each.state is State.LOADING]
    if len(used) > world.memory.limit:
        assert urgent or not done.load
        assert all(each.state in (State.SERVING, State.LOADING) or each.streams for each in used)


@given(worlds())
def test_carrying_plans_out_comes_to_rest(world: World) -> None:
    """After at most three plans nothing is left to do: nothing is loaded and dropped in turn."""
    for _ in range(3):
        world = world.carried_out(world.plan())
    rest = world.plan()
    assert (rest.refuse, rest.drop, rest.load, rest.admit, rest.reject) == ((), (), (), (), ())
    after = world.carried_out(rest).plan()
    assert (after.serve, after.awaited, after.wait) == (rest.serve, rest.awaited, rest.wait)


@given(worlds())
def test_a_rollback_waits_for_nothing(world: World) -> None:
    done = world.plan()
    after = world.carried_out(done)
    for call in world.wanted:
        residency = world.residency(call.version.number)
        other = residency is not None and residency.version.digest != call.version.digest
        # Another registry's version of that number has to go first.
        if call.at_once and not (other and residency.state is not State.AVAILABLE):  # type: ignore[union-attr]
            number = call.version.number
            there = after.residency(number)
            assert number in (*done.admit, *done.reject) or (there is not None and there.state is State.LOADING)
            assert call.version not in done.wait or number in done.reject


@given(crowded_worlds(), st.data())
def test_a_better_version_is_not_starved_by_calls_for_others(
    crowded: tuple[Version, World], data: st.DataObject
) -> None:
    best, world = crowded
    for _ in range(3):
        now = world.plan()
        if best in now.load:
            break
        assert (now.awaited, best in now.wait) == (best, True)
        urgent = {call.version.number for call in world.wanted if call.at_once}
        assert set(now.admit) | {each.number for each in now.load} <= urgent
        world = world.carried_out(now).loaded()
        known = {call.version.number for call in world.wanted} | {best.number}
        more = data.draw(calls(tuple(world.seen.eligible.values()), frozenset()))
        world = replace(world, wanted=(*world.wanted, *(call for call in more if call.version.number not in known)))
    else:
        # Once the streams have ended there is room.
        world = world.carried_out(world.plan()).loaded().drained()
        now = world.plan()
    assert best in now.load
    assert world.carried_out(now).loaded().plan().serve == best.number


@given(worlds())
def test_calls_are_answered_in_their_order(world: World) -> None:
    done = world.plan()
    blocked = done.awaited in done.wait
    for call in world.wanted:
        number = call.version.number
        if number in done.reject or call.at_once:
            continue
        if blocked and call.version != done.awaited:
            assert number not in done.admit and call.version not in done.load
        blocked = blocked or call.version in done.wait


def test_the_version_that_the_policy_prefers_is_loaded_while_another_one_serves() -> None:
    done = World(registry([2, 1]), Memory(2, (serving(1),))).plan()
    assert done == Plan(serve=1, awaited=version(2), load=(version(2),))


def test_a_version_that_is_ready_serves_while_a_better_one_is_being_loaded() -> None:
    done = World(registry([3, 2, 1]), Memory(3, (serving(1), resident(2), resident(3, State.LOADING)))).plan()
    assert done == Plan(serve=2, awaited=version(3))


def test_the_version_that_was_used_longest_ago_makes_room_and_a_held_one_goes_last() -> None:
    there = (resident(1, held=True), serving(2, used=9), resident(3, used=5), resident(4, used=4))
    for limit, dropped in ((5, ()), (4, (4,)), (3, (4, 3)), (2, (4, 3, 1))):
        done = World(registry([5]), Memory(limit, there)).plan()
        assert (done.drop, done.load) == (dropped, (version(5),))


def test_the_version_that_should_serve_and_a_rollback_needs_does_not_wait() -> None:
    there = (serving(1), resident(2, State.LOADING))
    done = World(registry([6]), Memory(2, there), (Wanted(version(6), at_once=True), Wanted(version(2)))).plan()
    assert (done.load, done.wait) == ((version(6),), ())


def test_a_version_that_no_call_can_use_makes_room_before_any_other() -> None:
    there = (serving(1), resident(2), resident(3, leaving=True))
    done = World(registry([4]), Memory(3, there)).plan()
    assert (done.drop, done.load) == ((3,), (version(4),))


@pytest.mark.parametrize("reason", ["leaving", "removed", "refused", "worse"])
def test_an_idle_version_goes_that_no_call_can_use(reason: str) -> None:
    seen = registry([2, 1], [2] if reason == "refused" else [])
    if reason == "removed":
        seen = replace(seen, digests={1: "digest 1"}, eligible={1: version(1)})
    two = replace(resident(2), leaving=reason == "leaving")
    if reason == "worse":
        two = replace(two, version=version(2, 3.1))
    elif reason == "leaving":
        seen = replace(seen, preferred=(1,))
    done = World(seen, Memory(2, (serving(1), two))).plan()
    assert (done.serve, done.drop) == (1, (2,))
    assert [refusal.reason for refusal in done.refuse] == (["worse"] if reason == "worse" else [])


@pytest.mark.parametrize(
    ("loss", "windows", "reason"),
    [(3.0, "windows", None), (3.04, "windows", None), (3.06, "windows", "worse"), (2.0, "others", "loss_mismatch")],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_version_serves_only_if_it_is_about_as_good_as_the_one_before(
    loss: float, windows: str, reason: str | None, restarted: bool
) -> None:
    two = replace(version(2, loss), windows=windows)
    seen = registry([2, 1])
    seen = replace(seen, eligible={1: version(1), 2: replace(two, loss=None)})
    there = (resident(1, State.AVAILABLE) if restarted else serving(1), replace(resident(2), version=two))
    done = World(seen, Memory(2, there)).plan()
    assert [(refusal.number, refusal.reason, refusal.stands_on) for refusal in done.refuse] == (
        [(2, reason, "digest 1")] if reason else []
    )
    assert (done.serve == 2) == (reason is None)


def test_a_worse_version_that_is_held_is_neither_refused_nor_served_until_it_is_chosen() -> None:
    there = (serving(1), replace(resident(2, held=True), version=version(2, 3.5)))
    done = World(registry([2, 1]), Memory(2, there)).plan()
    assert (done.serve, done.refuse, done.drop) == (1, (), ())
    assert World(registry([2], compares=False), Memory(2, there)).plan().serve == 2


def test_a_run_that_is_followed_takes_over_without_a_comparison() -> None:
    worse = replace(version(2, 9.0), run="followed")
    there = (serving(1), replace(resident(2), version=worse))
    assert World(registry([2], run="followed"), Memory(2, there)).plan().serve == 2


def test_losses_compare_only_on_one_evaluation_set() -> None:
    other = replace(version(2, 9.0), evaluation_set="another set")
    there = (serving(1), replace(resident(2), version=other))
    assert World(registry([2, 1]), Memory(2, there)).plan().serve == 2


def test_after_a_refusal_the_version_that_served_last_serves_again() -> None:
    there = (serving(1, served=9), resident(2, served=3), resident(3, served=4), resident(4))
    done = World(registry([], [1]), Memory(4, there)).plan()
    assert (done.serve, done.drop) == (3, (1,))


def test_the_successor_of_a_refused_version_does_not_wait_for_room() -> None:
    there = (serving(1, streams=1), resident(2, streams=1))
    done = World(registry([3], [1]), Memory(2, (there[0], replace(there[1], retry_at=NOW + 1)))).plan()
    assert (done.serve, done.load, done.wait) == (1, (version(3),), ())


def test_a_version_that_could_not_be_read_is_not_loaded_before_its_time() -> None:
    seen = registry([2, 1])
    later = Memory(2, (serving(1), resident(2, State.AVAILABLE, retry_at=NOW + 0.1)))
    assert World(seen, later).plan().load == ()
    sooner = Memory(2, (serving(1), resident(2, State.AVAILABLE, retry_at=NOW)))
    assert World(seen, sooner).plan().load == (version(2),)


def test_another_registry_in_the_same_place_takes_over() -> None:
    seen = registry([1])
    old = replace(serving(1, streams=1), version=replace(version(1), digest="old"))
    busy = World(seen, Memory(2, (old,))).plan()
    assert (busy.serve, busy.drop, busy.load, busy.wait) == (None, (), (), (version(1),))
    idle = World(seen, Memory(2, (replace(old, streams=0),))).plan()
    assert (idle.serve, idle.drop, idle.load) == (None, (1,), (version(1),))


def test_a_version_that_serves_stays_when_it_is_removed_from_the_registry() -> None:
    seen = Seen(eligible={}, preferred=(), fallback=(), digests={})
    assert World(seen, Memory(2, (serving(2),))).plan() == Plan(serve=2, awaited=None)
