"""Draws charts of the measurements at several rates, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

# Draws into files and needs no display.
mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from tests.benchmarks.recording import Recording
from tests.benchmarks.summary import Percentiles, Summary, inter_token_s

Run = tuple[Summary, Recording]

LATENCIES = {"first_token": "time to first token", "inter_token": "inter-token latency", "end_to_end": "end to end"}
LINES = {"p50_s": "-", "p95_s": "--", "p99_s": ":"}


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Writes all charts into a folder; returns the files."""
    summaries: dict[str, list[Summary]] = {}
    for summary, _ in sorted(runs, key=lambda run: run[0].offered_per_s):
        summaries.setdefault(summary.implementation, []).append(summary)
    figures = {
        "latency.png": _latency(summaries),
        "throughput.png": _throughput(summaries),
        "inter_token_latency.png": _inter_token(runs),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
    return [folder / name for name in figures]


def _latency(summaries: Mapping[str, Sequence[Summary]]) -> Figure:
    """Draws each latency against the offered rate, with a colour for each implementation."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, (field, title) in zip(axes, LATENCIES.items(), strict=True):
        for number, (name, each) in enumerate(summaries.items()):
            measured: list[tuple[float, Percentiles]] = [
                (summary.offered_per_s, times) for summary in each if (times := getattr(summary, field)) is not None
            ]
            rates = [rate for rate, _ in measured]
            for percentile, line in LINES.items():
                milliseconds = [1e3 * getattr(times, percentile) for _, times in measured]
                label = f"{name}, {percentile.removesuffix('_s')}"
                axis.plot(rates, milliseconds, line, color=f"C{number}", marker=".", label=label)
        axis.set(title=title, xlabel="offered requests/s", ylabel="ms", yscale="log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize="small")
    return figure


def _throughput(summaries: Mapping[str, Sequence[Summary]]) -> Figure:
    """Draws requests and tokens a second against the offered rate."""
    figure, (requests, tokens) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    offered = sorted({summary.offered_per_s for each in summaries.values() for summary in each})
    requests.plot(offered, offered, ":", color="grey", label="offered")
    for number, (name, each) in enumerate(summaries.items()):
        rates = [summary.offered_per_s for summary in each]
        color = f"C{number}"
        requests.plot(rates, [summary.achieved_per_s for summary in each], color=color, marker="o", label=name)
        tokens.plot(rates, [summary.tokens_per_s for summary in each], color=color, marker="o", label=name)
    requests.set(title="completed requests", xlabel="offered requests/s", ylabel="requests/s", ylim=(0, None))
    tokens.set(title="output tokens", xlabel="offered requests/s", ylabel="tokens/s", ylim=(0, None))
    for axis in (requests, tokens):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def _inter_token(runs: Sequence[Run]) -> Figure:
    """Draws, for each rate, the share of tokens that arrived within a time after the previous token."""
    rates = sorted({summary.offered_per_s for summary, _ in runs})
    size = (1.5 + 4 * len(rates), 4.5)
    figure, axes = plt.subplots(
        1, len(rates), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for axis, rate in zip(axes[0], rates, strict=True):
        for summary, recording in runs:
            if summary.offered_per_s == rate and (times_s := sorted(inter_token_s(recording))):
                shares = np.arange(1, len(times_s) + 1) / len(times_s)
                axis.plot(1e3 * np.array(times_s), shares, label=summary.implementation)
        axis.set(title=f"{rate:g} requests/s offered", xlabel="inter-token latency, ms", xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="share of tokens")
    axes[0][0].legend(fontsize="small")
    return figure
