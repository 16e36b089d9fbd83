import pytest

from tests.benchmarks.closed_loop import ClosedLoop
from tests.benchmarks.engine import cost_of, in_turn
from tests.benchmarks.side_by_side import Measured


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "gptloop-engine", "b", "gptloop-grpc"], ["a", "gptloop-engine", "gptloop-grpc", "b"]),
        (["gptloop-grpc", "a", "gptloop-engine"], ["a", "gptloop-engine", "gptloop-grpc"]),
        (["gptloop-engine greedy", "gptloop-grpc"], ["gptloop-engine greedy", "gptloop-grpc"]),
        (["gptloop-http", "a", "gptloop-grpc"], ["a", "gptloop-grpc", "gptloop-http"]),
    ],
)
def test_the_faces_of_the_engine_are_measured_one_after_the_other(names: list[str], expected: list[str]) -> None:
    assert in_turn(names) == expected


def test_the_cost_of_a_face_compares_the_same_rounds() -> None:
    work = ClosedLoop(rows=32, prompt_tokens=16, output_tokens=64, vocabulary_size=100)
    # The machine slows down with each round, and gRPC adds 20, 15, 0, 5 and 10 %.
    measured = {
        "gptloop-engine": Measured((1.0, 2.0, 3.0, 4.0, 5.0), 1),
        "gptloop-grpc": Measured((1.2, 2.3, 3.0, 4.2, 5.5), 1),
    }
    assert cost_of("gptloop-grpc", "gptloop-engine", [(work, measured)]).endswith(
        "(quartiles): 10.0 % (5.0 to 15.0) at x32."
    )


def test_the_step_time_is_the_median_of_the_rounds_and_the_spread_is_relative_to_it() -> None:
    measured = Measured((2.0, 1.0, 6.0), 1)
    assert (measured.step_s, measured.spread) == (2.0, 2.5)
