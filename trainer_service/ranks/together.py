"""Work that the ranks of a run do before the first step, which ends in all of them if it fails or stops in one."""

import time
from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

import mlx.core as mx

from shared.errors import GptloopError, Unavailable
from trainer_service.jobs.attempt import Stopped
from trainer_service.training.ranks import Ranks, read

Result = TypeVar("Result")

# Returns True once any rank has to end.
MustEnd = Callable[[], bool]

_INTERVAL_S = 0.2


class _State(IntEnum):
    WORKING = 0
    DONE = 1
    STOPPED = 2
    FAILED = 3


def lead(
    ranks: Ranks, work: Callable[[MustEnd], Result], facts: Callable[[Result], str], stop_requested: MustEnd
) -> Result:
    """Does the work of rank 0 while the others wait, tells them a text about its result, and waits while they do theirs
    (`follow`). Raises as `together` does."""
    result = together(ranks, work, stop_requested)
    ranks.share(facts(result) if ranks.count > 1 else "")
    together(ranks, lambda _: None, stop_requested)
    return result


def follow(ranks: Ranks, work: Callable[[str, MustEnd], Result], stop_requested: MustEnd) -> Result:
    """Waits while rank 0 does its work, and does that of another rank, which gets the text. Raises as `together`."""
    together(ranks, lambda _: None, stop_requested)
    text = ranks.share()
    return together(ranks, lambda must_end: work(text, must_end), stop_requested)


def together(ranks: Ranks, work: Callable[[MustEnd], Result], stop_requested: MustEnd) -> Result:
    """Does the work of this rank, waits until all others have done theirs, and returns its result.

    `work` gets a function that it calls at short intervals, and which returns True once any rank has to end: then it
    raises `Stopped`. The ranks tell one another their states inside that function, so no rank waits for one that has
    ended. Raises what the work of this rank raises; `Stopped` if a rank has stopped or rank 0 has failed; `Unavailable`
    with its sentence if another one has failed; and `RankLost`.
    """
    if ranks.count == 1:
        return work(stop_requested)
    states = [_State.WORKING] * ranks.count
    exchanged_s = 0.0

    def exchange(state: _State) -> None:
        nonlocal states, exchanged_s
        with ranks.guard():
            own = mx.array([int(state) if rank == ranks.rank else 0 for rank in range(ranks.count)], mx.int32)
            states = [_State(number) for number in read(mx.distributed.all_sum(own)).tolist()]
        exchanged_s = time.monotonic()

    def must_end() -> bool:
        if time.monotonic() - exchanged_s >= _INTERVAL_S and max(states) < _State.STOPPED:
            exchange(_State.WORKING)
        return max(states) >= _State.STOPPED or stop_requested()

    error: Exception | None = None
    try:
        result = work(must_end)
        state = _State.DONE
    except Stopped as stopped:
        state, error = _State.STOPPED, stopped
    except GptloopError as failure:
        state, error = _State.FAILED, failure
    while True:
        exchange(state)
        if _State.WORKING not in states:
            break
        time.sleep(_INTERVAL_S)
        if state is _State.DONE and stop_requested():
            state = _State.STOPPED
    if _State.FAILED in states:
        first = states.index(_State.FAILED)
        sentence = ranks.share(str(error), first)
        if first == 0 != ranks.rank:
            # Rank 0 reports it.
            raise Stopped
        if first != ranks.rank:
            raise Unavailable(f"Rank {first} has failed: {sentence}") from error
    if error is not None:
        raise error
    if _State.STOPPED in states:
        raise Stopped
    return result
