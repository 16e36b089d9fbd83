from hypothesis import given
from hypothesis import strategies as st

from inference_service.engine.request import Draw, Finished, FinishReason, GenerationRequest
from inference_service.engine.scheduler import CHUNK_TOKENS, STEP_PREFILL_TOKENS, Scheduler
from inference_service.engine.sequence import Sequence

CONTEXT = 1000


def sequence(name: str, prompt: int, max_tokens: int = 3) -> Sequence:
    request = GenerationRequest(
        id=name, version=1, prompt=tuple(range(prompt)), seed=0, max_tokens=max_tokens, arrived=0.0
    )
    return Sequence(request, CONTEXT, end_token=256, piece=lambda token: b"x")


def step(scheduler: Scheduler) -> list[str]:
    """Admits, plans and carries out one step with made-up tokens; the names that got a token."""
    scheduler.admit()
    plan = scheduler.plan()
    if plan is None:
        return []
    scheduler.record(plan)
    drawn = [row.sequence for row in plan.rows]
    drawn += [chunk.sequence for chunk in plan.chunks if chunk.end == len(chunk.sequence.request.prompt)]
    for one in drawn:
        if isinstance(one.accept(Draw(7), 0.0)[-1], Finished):
            scheduler.remove(one)
    return [one.request.id for one in drawn]


def test_slots_are_given_first_come_first_served() -> None:
    scheduler = Scheduler(2)
    for name in "abcd":
        scheduler.add(sequence(name, 4, max_tokens=1))
    assert [step(scheduler) for _ in range(3)] == [["a", "b"], ["c", "d"], []]


def test_a_long_prompt_does_not_stop_those_that_decode() -> None:
    scheduler = Scheduler(2)
    scheduler.add(sequence("short", 4, max_tokens=50))
    step(scheduler)
    scheduler.add(sequence("long", 3 * STEP_PREFILL_TOKENS))
    assert [step(scheduler) for _ in range(4)] == [["short"], ["short"], ["short", "long"], ["short", "long"]]


def test_a_removed_sequence_frees_its_slot_for_the_next_plan() -> None:
    scheduler = Scheduler(2)
    first, second, third = (sequence(name, 4) for name in "abc")
    for one in (first, second, third):
        scheduler.add(one)
    scheduler.admit()
    slot = scheduler.slot_of(first)
    scheduler.remove(first)
    assert scheduler.admit() == [third]
    assert scheduler.slot_of(third) == slot


def test_a_waiting_sequence_can_be_removed() -> None:
    scheduler = Scheduler(2)
    waiting = sequence("a", 4)
    scheduler.add(waiting)
    scheduler.remove(waiting)
    assert scheduler.sequences == []
    assert step(scheduler) == []


@given(
    slots=st.integers(2, 4),
    prompts=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 5)), min_size=1, max_size=12),
)
def test_every_plan_is_sound_and_every_sequence_ends(slots: int, prompts: list[tuple[int, int]]) -> None:
    scheduler = Scheduler(slots)
    sequences = [sequence(str(number), *shape) for number, shape in enumerate(prompts)]
    for one in sequences:
        scheduler.add(one)
    first_tokens: list[str] = []
    while scheduler.sequences:
        scheduler.admit()
        plan = scheduler.plan()
        assert plan is not None
        read = sum(chunk.end - chunk.start for chunk in plan.chunks)
        assert read < STEP_PREFILL_TOKENS + CHUNK_TOKENS
        for chunk in plan.chunks:
            assert chunk.start % CHUNK_TOKENS == 0
            assert plan.positions[chunk.slot] >= chunk.end
        for row in plan.rows:
            assert plan.positions[row.slot] == row.sequence.read
        held = {row.slot for row in plan.rows} | {chunk.slot for chunk in plan.chunks}
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        assert held <= set(range(slots))
        assert all(position < CONTEXT for position in plan.positions)
        first_tokens += [name for name in step(scheduler) if name not in first_tokens]
    assert {*first_tokens} == {one.request.id for one in sequences}
    assert all(len(one.generated) == one.request.max_tokens for one in sequences)


def test_a_full_context_ends_a_sequence() -> None:
    one = sequence("a", CONTEXT - 2, max_tokens=100)
    assert len(one.accept(Draw(7), 0.0)) == 1
    end = one.accept(Draw(7), 0.0)[-1]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.CONTEXT_LENGTH
