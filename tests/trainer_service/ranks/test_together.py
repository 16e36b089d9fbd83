"""Work before the first step, in real ranks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shared.errors import DataError, GptloopError
from tests.ring_processes import in_ranks
from trainer_service.jobs.attempt import Stopped
from trainer_service.ranks.together import follow, lead, together
from trainer_service.training.ranks import Ranks

pytestmark = pytest.mark.slow


def endless(must_end: Callable[[], bool]) -> str:
    """Works until it is told to end, as preparation does."""
    while not must_end():
        pass
    raise Stopped


def failing(_: object) -> str:
    raise DataError("The text is damaged.")


def stopping(_: object) -> str:
    raise Stopped


def done(_: object) -> str:
    return "done"


WORKS: dict[str, Callable[[Callable[[], bool]], str]] = {
    each.__name__: each for each in (endless, failing, stopping, done)
}


def outcome(works: Sequence[str], stopped_rank: int | None = None) -> str:
    """Does the work of this rank, and returns its result or how it ended."""
    ranks = Ranks.join()
    try:
        return together(ranks, WORKS[works[ranks.rank]], lambda: ranks.rank == stopped_rank)
    except (GptloopError, Stopped) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize(
    ("works", "stopped_rank", "outcomes"),
    [
        ("done done done", None, ["done"] * 3),
        ("endless done stopping", None, ["Stopped "] * 3),
        # The last one is asked to stop when it waits for the others.
        ("endless endless done", 2, ["Stopped "] * 3),
        ("failing endless done", None, ["DataError The text is damaged.", "Stopped ", "Stopped "]),
        (
            "endless failing done",
            None,
            [
                "Unavailable Rank 1 has failed: The text is damaged.",
                "DataError The text is damaged.",
                "Unavailable Rank 1 has failed: The text is damaged.",
            ],
        ),
    ],
)
def test_all_ranks_end_as_one_does(works: str, stopped_rank: int | None, outcomes: list[str], tmp_path: Path) -> None:
    assert in_ranks(3, outcome, tmp_path, works.split(), stopped_rank) == outcomes


def in_turn() -> list[str]:
    ranks, order = Ranks.join(), list[str]()

    def never() -> bool:
        return False

    if ranks.rank == 0:
        order.append(lead(ranks, done, lambda result: f"it is {result}", never))
    else:
        order.append(follow(ranks, lambda text, _: f"heard {text}", never))
    return order


def test_other_ranks_work_on_what_rank_0_says(tmp_path: Path) -> None:
    assert in_ranks(2, in_turn, tmp_path) == [["done"], ["heard it is done"]]


def test_a_rank_that_is_alone_only_works() -> None:
    assert lead(Ranks.alone(), lambda must_end: str(must_end()), str, lambda: True) == "True"
