import pytest

from tests.benchmarks.recording import Recording, Stream
from tests.benchmarks.summary import Percentiles, Summary, inter_token_s, print_summaries

RECORDING = Recording(
    [
        Stream(due_s=0.0, sent_s=0.1, token_s=[1.0, 1.5, 2.5], end_s=2.6),
        Stream(due_s=1.0, sent_s=1.0, token_s=[2.0, 2.0], end_s=4.0),
        Stream(due_s=2.0, sent_s=2.0, token_s=[3.0, 9.0], end_s=5.0, status="DEADLINE_EXCEEDED"),
    ],
    resident_bytes=[10, 30, 20],
)


def test_latencies_count_from_the_time_at_which_a_request_was_due() -> None:
    summary = Summary.of("one", 3.0, RECORDING)
    assert summary.first_token is not None
    assert summary.first_token.p50_s == 1.0
    assert summary.end_to_end is not None
    assert summary.end_to_end.p50_s == pytest.approx(2.8)
    assert summary.latest_send_s == pytest.approx(0.1)


def test_a_failed_stream_counts_as_an_error_and_not_in_latencies() -> None:
    summary = Summary.of("one", 3.0, RECORDING)
    assert (summary.requests, summary.errors) == (3, {"DEADLINE_EXCEEDED": 1})
    assert summary.achieved_per_s == pytest.approx(2 / 5)
    assert summary.tokens_per_s == pytest.approx(7 / 5)
    assert inter_token_s(RECORDING) == [0.5, 1.0, 0.0]


def test_memory_is_reported_at_the_start_the_end_and_the_peak() -> None:
    summary = Summary.of("one", 3.0, RECORDING)
    assert (summary.start_bytes, summary.end_bytes, summary.peak_bytes) == (10, 20, 30)


def test_a_recording_survives_a_pipe() -> None:
    assert Recording.from_json(RECORDING.to_json()) == RECORDING


def test_tables_include_a_rate_without_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = Recording([Stream(0.0, 0.0, [], 1.0, "UNAVAILABLE")], [1, 1])
    print_summaries([Summary.of("one", 4.0, nothing), Summary.of("other", 3.0, RECORDING)])
    printed = capsys.readouterr().out
    assert "1 UNAVAILABLE" in printed
    assert printed.index("| other") < printed.index("| one")


def test_percentiles_of_no_times_are_none() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([0.1] * 100) == Percentiles(0.1, 0.1, 0.1)
