"""The promises of the scheduler, with made-up tokens instead of a model."""

import math
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from inference_service.engine.request import Draw, Finished, FinishReason, GenerationRequest
from inference_service.engine.scheduler import Group, Plan, Scheduler
from inference_service.engine.sequence import Sequence
from shared.decoding.spans import SPAN_TOKENS

CONTEXT = 1000
BUDGET = 2 * SPAN_TOKENS


def group(name: str, prompt: int, max_tokens: int = 3, samples: int = 1) -> Group:
    request = GenerationRequest(
        id=name, version=1, prompt=tuple(range(prompt)), seed=0, max_tokens=max_tokens, arrived=0.0, samples=samples
    )
    return tuple(
        Sequence(request, index, CONTEXT, end_token=256, token_bytes=lambda token: b"x") for index in range(samples)
    )


def carry_out(scheduler: Scheduler, plan: Plan) -> list[Sequence]:
    """Carries out a step and returns the sequences that got a token."""
    scheduler.record(plan)
    drawn = [row.sequence for row in plan.rows]
    drawn += [sequence for chunk in plan.chunks if chunk.ends_prompt for sequence in chunk.group]
    for sequence in drawn:
        if isinstance(sequence.accept((Draw(7),) * plan.decode_steps, None, 0.0)[-1], Finished):
            scheduler.remove(sequence)
    return drawn


def step(scheduler: Scheduler, budget: int = BUDGET) -> list[str]:
    """Admits, plans and carries out one step; returns the names that got a token."""
    scheduler.admit()
    plan = scheduler.plan(budget)
    return [] if plan is None else [sequence.request.id for sequence in carry_out(scheduler, plan)]


def test_slots_go_first_come_first_served() -> None:
    scheduler = Scheduler(2)
    for name in "abcd":
        scheduler.add(group(name, 4, max_tokens=1))
    assert [step(scheduler) for _ in range(3)] == [["a", "b"], ["c", "d"], []]


def test_a_long_prompt_does_not_stop_decoding_sequences() -> None:
    scheduler = Scheduler(2)
    scheduler.add(group("short", 4, max_tokens=50))
    step(scheduler)
    scheduler.add(group("long", 3 * BUDGET))
    assert [step(scheduler) for _ in range(4)] == [["short"], ["short"], ["short", "long"], ["short", "long"]]


def test_prompts_are_computed_in_order_and_none_overtakes() -> None:
    scheduler = Scheduler(3)
    for name, prompt in (("a", 70), ("b", 100), ("c", 3)):
        scheduler.add(group(name, prompt, max_tokens=1))
    # a: 64 + 6, then b's 64 do not fit any more, and c, which would, waits for b.
    assert step(scheduler) == ["a"]
    assert step(scheduler) == ["b", "c"]


def test_samples_share_one_computation_of_the_prompt() -> None:
    scheduler = Scheduler(3)
    scheduler.add(group("n", 70, max_tokens=2, samples=3))
    (admitted,) = scheduler.admit()
    plan = scheduler.plan(BUDGET)
    assert plan is not None
    assert [(chunk.start, chunk.end, len(set(chunk.slots))) for chunk in plan.chunks] == [(0, 64, 3), (64, 70, 3)]
    assert carry_out(scheduler, plan) == list(admitted)
    assert [sequence.computed_tokens for sequence in admitted] == [70, 70, 70]
    assert step(scheduler) == ["n", "n", "n"]


def test_a_removed_sequence_frees_its_slot_for_the_next_plan() -> None:
    scheduler = Scheduler(2)
    groups = [group(name, 4) for name in "abc"]
    for one in groups:
        scheduler.add(one)
    scheduler.admit()
    slot = scheduler.slot_of(groups[0][0])
    scheduler.remove(groups[0][0])
    assert scheduler.admit() == [groups[2]]
    assert scheduler.slot_of(groups[2][0]) == slot


def test_a_waiting_request_can_be_removed() -> None:
    scheduler = Scheduler(3)
    waiting = group("a", 4, samples=2)
    scheduler.add(waiting)
    for sequence in waiting:
        scheduler.remove(sequence)
    assert scheduler.sequences == []
    assert step(scheduler) == []


def test_lost_prompts_are_computed_again() -> None:
    scheduler = Scheduler(2)
    scheduler.add(group("a", 200, max_tokens=1))
    step(scheduler)
    scheduler.forget_prompts()
    assert [step(scheduler) for _ in range(2)] == [[], ["a"]]


def test_a_full_context_ends_a_sequence() -> None:
    (one,) = group("a", CONTEXT - 2, max_tokens=100)
    assert len(one.accept((Draw(7),), None, 0.0)) == 1
    end = one.accept((Draw(7),), None, 0.0)[-1]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.CONTEXT_LENGTH


def test_sequences_decode_multi_step_while_nothing_is_between_two_tokens() -> None:
    scheduler = Scheduler(3)
    scheduler.add(group("a", 4, max_tokens=4))
    scheduler.add(group("b", 4, max_tokens=25))

    def tokens() -> int:
        scheduler.admit()
        plan = scheduler.plan(BUDGET, 8)
        assert plan is not None
        carry_out(scheduler, plan)
        return plan.decode_steps

    # Prompts; then as many as the longest may draw, although the other ends before.
    assert [tokens() for _ in range(2)] == [1, 8]
    # What was promised for the next step comes before a prompt; then a stream that needs the host, until it has ended;
    # and no more than are left.
    (wanting,) = group("c", 4, max_tokens=3)
    wanting.needs_only_temperature = False
    scheduler.add((wanting,))
    assert [tokens() for _ in range(5)] == [8, 1, 1, 1, 5]
    assert scheduler.sequences == []


@dataclass(frozen=True)
class Arrival:
    """A request that arrives before a step and is cancelled this many steps later."""

    step: int
    prompt: int
    max_tokens: int
    samples: int
    cancelled_after: int | None


@dataclass
class Watched:
    """A request that the test follows, with its bounds from the moment at which they began."""

    group: Group
    arrived: int
    slots_by: float
    admitted: int | None = None
    first_token_by: float = math.inf


# Many at once, long prompts before short ones, and arrivals exactly when a slot becomes free.
arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 40),
        prompt=st.one_of(st.integers(1, 400), st.sampled_from([1, 63, 64, 65, 128, 256])),
        max_tokens=st.integers(1, 30),
        samples=st.sampled_from([1, 1, 1, 2, 3]),
        cancelled_after=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=30,
)


def chunks_of(tokens: int, read: int = 0) -> int:
    return math.ceil(tokens / SPAN_TOKENS) - read // SPAN_TOKENS


@given(
    slots=st.integers(3, 5),
    per_step=st.integers(1, 4),
    rest=st.integers(0, SPAN_TOKENS - 1),
    max_decode_steps=st.integers(1, 8),
    arrivals=arrivals,
)
def test_no_request_waits_longer_than_promised(
    slots: int, per_step: int, rest: int, max_decode_steps: int, arrivals: list[Arrival]
) -> None:
    """The bounds in the scheduler's docstring hold for any arrivals and cancels."""
    budget = per_step * SPAN_TOKENS + rest
    longest = max(chunks_of(one.prompt) for one in arrivals)
    # What was begun for the next step comes before a prompt.
    begun = int(max_decode_steps > 1)
    h = math.ceil(slots * longest / per_step) + max(one.max_tokens for one in arrivals) + begun
    scheduler = Scheduler(slots)
    watched: list[Watched] = []
    coming = sorted(enumerate(arrivals), key=lambda pair: pair[1].step)
    cancels: list[tuple[int, Watched]] = []
    now = 0
    while coming or scheduler.sequences:
        while coming and coming[0][1].step <= now:
            number, arrival = coming.pop(0)
            before = sum(len(one.group) for one in watched if one.admitted is None and one.slots_by > 0)
            one = Watched(
                group(str(number), arrival.prompt, arrival.max_tokens, arrival.samples),
                now,
                now + (2 * (before // (slots + 1)) + 2) * h,
            )
            scheduler.add(one.group)
            watched.append(one)
            if arrival.cancelled_after is not None:
                cancels.append((now + arrival.cancelled_after, one))
        for due, one in cancels:
            if due == now:
                for sequence in one.group:
                    if sequence in scheduler.sequences:
                        scheduler.remove(sequence)
                one.slots_by = 0
        for admitted in scheduler.admit():
            (one,) = (one for one in watched if one.group is admitted)
            assert now <= one.slots_by
            # No later request has a slot.
            assert all(other.admitted is None for other in watched if watched.index(other) > watched.index(one))
            one.admitted = now
            unread = sum(
                chunks_of(len(other.group[0].request.prompt), other.group[0].computed_tokens)
                for other in watched
                if other.admitted is not None and other.group[0] in scheduler.sequences and not other.group[0].prefilled
            )
            # Not before the step of its slot.
            one.first_token_by = now + math.ceil(unread / per_step) - 1 + begun
        plan = scheduler.plan(budget, max_decode_steps)
        decoding = [sequence for sequence in scheduler.sequences if sequence.prefilled]
        if plan is not None:
            assert plan.prompt_tokens <= budget
            assert 1 <= plan.decode_steps <= (1 if plan.chunks else max_decode_steps)
            # The gap between two tokens of a stream is one step.
            assert [row.sequence for row in plan.rows] == decoding
            check_sound(scheduler, plan, slots)
            drawn = carry_out(scheduler, plan)
            for one in watched:
                if one.admitted is not None and one.group[0] in drawn and one.group[0].generated_tokens == 1:
                    assert now <= one.first_token_by
        now += 1
        assert now < 100 * h
    ended = [one for one in watched if one.slots_by > 0]
    assert all(sequence.generated_tokens == sequence.request.max_tokens for one in ended for sequence in one.group)


def check_sound(scheduler: Scheduler, plan: Plan, slots: int) -> None:
    """Asserts that no slot serves two sequences, and that no chunk leaves a gap or crosses a limit."""
    held = [row.slot for row in plan.rows]
    for chunk in {chunk.group: chunk for chunk in plan.chunks}.values():
        held += chunk.slots
    assert len(set(held)) == len(held) <= slots and set(held) <= set(range(slots))
    reached: dict[Group, int] = {}
    for chunk in plan.chunks:
        assert chunk.start == reached.get(chunk.group, chunk.group[0].computed_tokens)
        assert chunk.start // SPAN_TOKENS == (chunk.end - 1) // SPAN_TOKENS
        reached[chunk.group] = chunk.end


def test_versions_take_turns_at_a_shared_budget() -> None:
    """Shares the budget like the engine: a version that computed prompts goes last."""
    lanes = {version: Scheduler(2) for version in range(3)}
    for version, lane in lanes.items():
        lane.add(group(str(version), 10 * BUDGET, max_tokens=1))
    read: list[int] = []
    for _ in range(9):
        budget = BUDGET
        for version, lane in list(lanes.items()):
            lane.admit()
            plan = lane.plan(budget)
            if plan is not None and plan.chunks:
                budget -= plan.prompt_tokens
                lanes[version] = lanes.pop(version)
                carry_out(lane, plan)
                read.append(version)
        assert budget >= 0
    assert read == [0, 1, 2] * 3
