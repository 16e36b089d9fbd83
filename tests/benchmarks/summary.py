"""Summaries of recordings."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from tests.benchmarks.recording import OK, Recording
from tests.benchmarks.side_by_side import print_table


@dataclass(frozen=True)
class Percentiles:
    """The 50th, 95th and 99th percentile of times."""

    p50_s: float
    p95_s: float
    p99_s: float

    @classmethod
    def of(cls, times_s: Sequence[float]) -> "Percentiles | None":
        """Returns None if there are no times."""
        return cls(*np.percentile(times_s, (50, 95, 99)).tolist()) if times_s else None


@dataclass(frozen=True)
class Summary:
    """Summarises one implementation at one rate.

    A request's times count from the moment at which it was due, so that a late sender hides no delay. Rates cover the
    whole time, to the end of the last request. Latencies are those of requests that got all their tokens.
    """

    implementation: str
    offered_per_s: float
    requests: int
    errors: dict[str, int]
    achieved_per_s: float
    tokens_per_s: float
    latest_send_s: float
    first_token: Percentiles | None
    inter_token: Percentiles | None
    end_to_end: Percentiles | None
    start_bytes: int
    end_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, implementation: str, offered_per_s: float, recording: Recording) -> "Summary":
        """Summarises a recording."""
        streams = recording.streams
        whole = [stream for stream in streams if stream.status == OK]
        seconds = max(stream.end_s for stream in streams)
        return cls(
            implementation,
            offered_per_s,
            len(streams),
            dict(Counter(stream.status for stream in streams if stream.status != OK)),
            len(whole) / seconds,
            sum(len(stream.token_s) for stream in streams) / seconds,
            max(stream.sent_s - stream.due_s for stream in streams),
            Percentiles.of([stream.token_s[0] - stream.due_s for stream in whole]),
            Percentiles.of(inter_token_s(recording)),
            Percentiles.of([stream.end_s - stream.due_s for stream in whole]),
            recording.resident_bytes[0],
            recording.resident_bytes[-1],
            max(recording.resident_bytes),
        )


def inter_token_s(recording: Recording) -> list[float]:
    """Returns the times between successive tokens of all complete streams; 0 for tokens that arrived together."""
    streams = (stream for stream in recording.streams if stream.status == OK)
    return [after - before for stream in streams for before, after in pairwise(stream.token_s)]


def print_summaries(summaries: Iterable[Summary]) -> None:
    """Prints a table of rates and memory, and a table of latencies."""
    ordered = sorted(summaries, key=lambda each: each.offered_per_s)
    heads = [[f"{each.offered_per_s:g}", each.implementation] for each in ordered]
    rates = [
        [
            f"{each.requests}",
            f"{each.achieved_per_s:.2f}",
            f"{each.tokens_per_s:,.0f}",
            ", ".join(f"{count} {code}" for code, count in each.errors.items()) or "none",
            *(f"{size / 2**20:,.0f} MiB" for size in (each.start_bytes, each.end_bytes, each.peak_bytes)),
        ]
        for each in ordered
    ]
    latencies = [
        [_milliseconds(times) for times in (each.first_token, each.inter_token, each.end_to_end)] for each in ordered
    ]
    offered = ["offered/s", "implementation"]
    memory = ["memory at start", "at end", "peak"]
    _print([*offered, "requests", "achieved/s", "tokens/s", "errors", *memory], heads, rates)
    print()
    columns = ["time to first token", "inter-token latency", "end to end"]
    _print([*offered, *(f"{name}: p50 / p95 / p99 ms" for name in columns)], heads, latencies)


def _print(columns: Sequence[str], heads: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> None:
    print_table(columns, [[*head, *row] for head, row in zip(heads, rows, strict=True)])


def _milliseconds(times: Percentiles | None) -> str:
    if times is None:
        return "none"
    return " / ".join(f"{1e3 * each:,.1f}" if each < 0.1 else f"{1e3 * each:,.0f}" for each in asdict(times).values())
