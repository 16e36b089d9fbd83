"""What the planner promises, over made-up versions: no model, disk or clock."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service.versions.planner import Memory, Plan, Seen, State, Version, Wanted, candidates
from tests.inference_service.versions.plans import (
    NOW,
    World,
    calls,
    crowded_worlds,
    registry,
    resident,
    serving,
    version,
    worlds,
)


@given(worlds())
def test_a_refused_version_neither_begins_to_serve_nor_answers_calls(world: World) -> None:
    done = world.plan()
    refused = world.seen.refused | {refusal.version.digest for refusal in done.refuse}
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
    others = [each for each in candidates(world.seen, world.memory, before, NOW) if each.digest in ready]
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
def test_a_plan_that_drops_no_held_version_settles_everything(world: World) -> None:
    """Nothing is loaded and dropped in turn."""
    done = world.plan()
    while any(each.held and each.version.number in done.drop for each in world.memory.residencies):
        world = world.carried_out(done)
        done = world.plan()
    world = world.carried_out(done)
    rest = world.plan()
    assert (rest.refuse, rest.drop, rest.load, rest.admit, rest.reject) == ((), (), (), (), ())
    assert (rest.serve, rest.awaited, rest.wait) == (done.serve, done.awaited, done.wait)


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
            assert number not in done.wait or number in done.reject


@given(crowded_worlds(), st.data())
def test_a_better_version_is_not_starved_by_calls_for_others(
    crowded: tuple[Version, World], data: st.DataObject
) -> None:
    best, world = crowded
    for _ in range(3):
        now = world.plan()
        if best in now.load:
            break
        assert (now.awaited, best.number in now.wait) == (best, True)
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
    blocked = done.awaited is not None and done.awaited.number in done.wait
    for call in world.wanted:
        number = call.version.number
        if number in done.reject or call.at_once:
            continue
        if blocked and call.version != done.awaited:
            assert number not in done.admit and call.version not in done.load
        blocked = blocked or number in done.wait


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
    there = (serving(1), resident(2, streams=1))
    done = World(registry([6]), Memory(2, there), (Wanted(version(2)), Wanted(version(6), at_once=True))).plan()
    assert (done.load, done.admit, done.wait) == ((version(6),), (2,), ())


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
    assert [(refusal.version.number, refusal.reason, refusal.stands_on) for refusal in done.refuse] == (
        [(2, reason, "digest 1")] if reason else []
    )
    assert (done.serve == 2) == (reason is None)


def test_a_worse_version_that_is_held_is_neither_refused_nor_served_until_it_is_chosen() -> None:
    there = (serving(1), replace(resident(2, held=True), version=version(2, 3.5)))
    done = World(registry([2, 1]), Memory(2, there)).plan()
    assert (done.serve, done.refuse, done.drop) == (1, (), ())
    assert World(registry([2], compares=False), Memory(2, there)).plan().serve == 2


def test_a_version_that_is_too_bad_does_not_serve_after_one_that_is_only_a_little_worse() -> None:
    there = (serving(1), replace(resident(2), version=version(2, 3.08)), replace(resident(3), version=version(3, 3.04)))
    done = World(registry([2, 3, 1]), Memory(3, there)).plan()
    assert (done.serve, [refusal.version.number for refusal in done.refuse]) == (3, [2])


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
    assert (busy.serve, busy.drop, busy.load, busy.wait) == (None, (), (), (1,))
    idle = World(seen, Memory(2, (replace(old, streams=0),))).plan()
    assert (idle.serve, idle.drop, idle.load) == (None, (1,), (version(1),))


def test_a_version_that_serves_stays_when_it_is_removed_from_the_registry() -> None:
    seen = Seen(eligible={}, preferred=(), fallback=(), digests={})
    assert World(seen, Memory(2, (serving(2),))).plan() == Plan(serve=2, awaited=None)
