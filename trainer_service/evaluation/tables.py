"""The tables of a report on evaluations. Loads no model framework."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from shared.text import format_size
from trainer_service.evaluation.comparison import Comparison
from trainer_service.evaluation.record import (
    Grades,
    Interval,
    Judged,
    Memory,
    MinimalPairs,
    Percentiles,
    Record,
    Speed,
    TextQuality,
    TrainingLoss,
    TrainingMemory,
    WritingFigures,
)
from trainer_service.evaluation.views.document import Table

# What a record does not have.
_ABSENT = "-"

Part = TypeVar("Part")
Row = tuple[str, ...]


def versions_table(records: Sequence[Record]) -> Table:
    """Lists the versions and when they were measured."""
    rows = (
        (
            str(record.version.number),
            record.version.run,
            f"{record.version.step:,}",
            f"{record.version.parameters:,}",
            _date(max(record.measured_at.values(), default=None)),
        )
        for record in records
    )
    return Table(("version", "run", "step", "parameters", "measured"), tuple(rows), left=(0, 1, 4))


def method_table(record: Record) -> Table:
    """Lists everything that the figures of the records of one method depend on."""
    method = record.method
    text = method.text
    writing = (
        f"{method.prompts} beginnings of {method.prompt_tokens} tokens, seeds {', '.join(map(str, method.seeds))}, up "
        f"to {method.max_tokens} tokens, temperature {method.temperature:g}"
    )
    rows = (
        ("text", text.name),
        ("revision", text.revision or _ABSENT),
        ("size", f"{text.tokens:,} tokens, {text.text_bytes:,} bytes, {text.documents:,} documents"),
        ("tokens' SHA-256", text.digest[:12]),
        ("tokenizer", method.tokenizer[:12]),
        ("windows", f"{method.windows:,} of {method.window:,} tokens, one every {method.stride:,}"),
        ("dropout", f"{method.dropout:g}"),
        ("computed", f"in {method.precision} on {method.device}"),
        ("writing", writing),
        ("method", f"{method.digest[:12]}, code {method.code}"),
    )
    return Table(("", ""), rows, left=(0, 1))


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Lists the paired differences in nats per token."""
    rows = (
        (
            str(each.after.number),
            str(each.before.number),
            f"{each.difference:+.4f}",
            _signed(each.interval),
            f"{each.won:.0%} of {each.units:,} {each.unit}s",
            each.verdict.value,
        )
        for each in comparisons
    )
    headings = ("version", "compared with", "nats/token", "95 % interval", "predicts better", "verdict")
    return Table(headings, tuple(rows), left=(0, 1, 4, 5))


def verdict_table(record: Record, records: Sequence[Record]) -> Table:
    """Lists the rivals of a version, and then itself, with the figures that the records have."""
    standing = record.verdict
    assert standing is not None
    qualities = {(each.version.number, each.method.digest): each.text for each in records}

    def figures(number: int, method_digest: str) -> Row:
        text = qualities.get((number, method_digest))
        return (_ABSENT, _ABSENT) if text is None else (f"{text.nats_per_token:.4f}", f"{text.bits_per_byte:.4f}")

    rows = [
        (
            each.role,
            str(each.version.number),
            *figures(each.version.number, each.method_digest),
            _number(each.difference, "{:+.4f}"),
            _signed(each.interval),
            each.verdict.value,
        )
        for each in standing.rivals
    ]
    itself = ("this version", str(record.version.number), *figures(record.version.number, record.method.digest))
    rows.append((*itself, _ABSENT, _ABSENT, "promoted" if standing.promoted else _ABSENT))
    headings = ("role", "version", "nats/token", "bits/byte", "difference", "95 % interval", "verdict")
    return Table(headings, tuple(rows), left=(0, 1, 6))


def quality_table(records: Sequence[Record]) -> Table:
    """Puts the figures on text of the records of one method side by side."""

    def text(name: str, value: Callable[[TextQuality], str]) -> Row:
        return _row(name, [record.text for record in records], value)

    def training(name: str, value: Callable[[TrainingLoss], str]) -> Row:
        return _row(name, [record.training for record in records], value)

    rows = [
        text("nats per token", lambda each: f"{each.nats_per_token:.4f}"),
        text("  95 % interval", lambda each: _interval(each.interval)),
        text("perplexity", lambda each: f"{each.perplexity:,.2f}"),
        text("bits per byte", lambda each: f"{each.bits_per_byte:.4f}"),
        training("on training text", lambda each: f"{each.nats_per_token:.4f}"),
        training("held-out minus training", lambda each: f"{each.gap:+.4f}"),
        training("  95 % interval", lambda each: _interval(each.gap_interval)),
        training("overfitting", lambda each: each.overfit.value),
    ]
    return _side_by_side(records, [*rows, *_pairs_rows(records)])


def positions_table(records: Sequence[Record]) -> Table:
    """Puts the losses by position in the window side by side."""
    texts = [record.text for record in records]
    places = [(each.first, each.last) for text in texts if text for each in text.positions]

    def at(place: tuple[int, int]) -> Callable[[TextQuality], str]:
        return lambda text: next(
            (f"{each.nats_per_token:.4f}" for each in text.positions if (each.first, each.last) == place), _ABSENT
        )

    return _side_by_side(
        records, [_row(f"positions {place[0]}-{place[1]}", texts, at(place)) for place in dict.fromkeys(places)]
    )


def writing_table(records: Sequence[Record]) -> Table:
    """Puts the figures about what the versions write side by side, and those about what people wrote."""
    columns: dict[str, WritingFigures | None] = {
        str(record.version.number): None if record.writing is None else record.writing.model for record in records
    }
    # Only the copies differ for people, because the versions may have been trained on different text.
    people = [(record.version.number, record.writing.human) for record in records if record.writing]
    if len({human for _, human in people}) == 1:
        columns["people"] = people[0][1]
    else:
        columns |= {f"people, for {number}": human for number, human in people}

    def figures(name: str, value: Callable[[WritingFigures], str]) -> Row:
        return _row(name, list(columns.values()), value)

    def different(size: int) -> Row:
        return figures(f"different {size}-grams", lambda each: f"{each.distinct[size - 1]:.1%}")

    rows = (
        figures("texts", lambda each: f"{each.texts:,}"),
        figures("tokens", lambda each: f"{each.tokens:,}"),
        *map(different, (1, 2, 3)),
        figures("repeated 4-grams", lambda each: f"{each.repeated:.1%}"),
        figures("end by themselves", lambda each: f"{each.ended:.0%}"),
        figures("longest copy, median", lambda each: _number(each.copied_median, "{:,.0f} tokens")),
        figures("longest copy, most", lambda each: _number(each.copied_longest, "{:,.0f} tokens")),
    )
    return Table(("", *columns), rows)


def judged_table(records: Sequence[Record]) -> Table:
    """Lists what a large teacher says about the texts of versions beside those of their rivals."""
    rows = (
        (
            str(record.version.number),
            str(each.rival.number),
            _number(each.win_rate, "{:.1%}"),
            _shares(each.interval),
            f"{each.judged:,} of {each.pairs:,}",
            _number(each.agreement, "{:.1%}"),
            f"{each.calibration:.1%} of {each.calibration_pairs}",
            each.verdict.value if each.verdict else "none",
            f"${each.cost_usd:.4f}",
        )
        for record in records
        for each in record.judged
    )
    headings = (
        *("version", "judged beside", "wins", "95 % interval", "pairs judged", "same in both orders"),
        *("known pairs right", "verdict", "cost"),
    )
    return Table(headings, tuple(rows), left=(0, 1, 7))


def grades_table(records: Sequence[Record]) -> Table:
    """Lists the mean grades of the texts of versions and of their rivals in these judgements."""

    def row(number: int, beside: int, grades: Grades | None) -> Row:
        found = (None,) * 3 if grades is None else (grades.grammar, grades.consistency, grades.creativity)
        return (f"{number} beside {beside}", *(_number(each, "{:.2f}") for each in found))

    def rows(record: Record, each: Judged) -> tuple[Row, Row]:
        version, rival = record.version.number, each.rival.number
        return row(version, rival, each.grades), row(rival, version, each.rival_grades)

    return Table(
        ("grades from 1 to 10", "grammar", "consistency", "creativity"),
        tuple(line for record in records for each in record.judged for line in rows(record, each)),
    )


def speed_table(records: Sequence[Record]) -> Table:
    """Puts the speeds side by side."""
    speeds = [record.speed for record in records]

    def speed(name: str, value: Callable[[Speed], str]) -> Row:
        return _row(name, speeds, value)

    rows = [
        speed("device", lambda each: each.device),
        speed("threads", lambda each: _ABSENT if each.threads is None else str(each.threads)),
        speed("training, tokens/s", lambda each: f"{each.training_tokens_per_s:,.0f}"),
        speed("  windows a step", lambda each: f"{each.training_rows:,}"),
        speed("prefill, tokens/s", lambda each: f"{each.prefill_tokens_per_s:,.0f}"),
    ]
    for count in dict.fromkeys(each.rows for found in speeds if found for each in found.decoding):
        decoding = [
            next((each for each in found.decoding if each.rows == count), None) if found else None for found in speeds
        ]
        name = f"{count:,} {'request' if count == 1 else 'requests'}"
        rows += [
            _row(f"{name}, tokens/s", decoding, lambda each: f"{each.tokens_per_s:,.0f}"),
            _row("  first token, ms", decoding, lambda each: _percentiles(each.first_token_ms)),
            _row("  inter-token, ms", decoding, lambda each: _percentiles(each.inter_token_ms)),
        ]
    return _side_by_side(records, rows)


def memory_table(records: Sequence[Record]) -> Table:
    """Puts the memory side by side, measured and estimated."""
    memories = [record.memory for record in records]

    def memory(name: str, value: Callable[[Memory], str]) -> Row:
        return _row(name, memories, value)

    rows = [
        memory("weights", lambda each: format_size(each.weights_bytes)),
        memory("optimizer", lambda each: format_size(each.optimizer_bytes)),
        memory("cache for 1,000 tokens", lambda each: format_size(1000 * each.cache_bytes_per_token)),
        memory("serving, with all slots", lambda each: format_size(each.serving_bytes)),
    ]
    for size in dict.fromkeys(each.batch_size for found in memories if found for each in found.training):
        training = [
            next((each for each in found.training if each.batch_size == size), None) if found else None
            for found in memories
        ]
        rows += [
            _row(f"training, batch of {size:,}: peak", training, lambda each: format_size(each.peak_bytes)),
            _row("  estimated", training, _estimated),
            _row("  activations", training, lambda each: format_size(each.activations_bytes)),
        ]
    return _side_by_side(records, rows)


def _pairs_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields the accuracy of each file of minimal pairs; files of one name and other content have their own rows."""
    for name, sha256 in dict.fromkeys((each.name, each.sha256) for record in records for each in record.pairs):
        pairs: list[MinimalPairs | None] = [
            next((each for each in record.pairs if each.sha256 == sha256), None) for record in records
        ]
        yield _row(f"pairs, {name}", pairs, lambda each: f"{each.accuracy:.1%}")
        yield _row("  95 % interval", pairs, lambda each: _shares(each.interval))


def _side_by_side(records: Sequence[Record], rows: Sequence[Row]) -> Table:
    return Table(("version", *(str(record.version.number) for record in records)), tuple(rows))


def _row(name: str, parts: Sequence[Part | None], value: Callable[[Part], str]) -> Row:
    return (name, *(_ABSENT if part is None else value(part) for part in parts))


def _interval(interval: Interval | None) -> str:
    return _ABSENT if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


def _shares(interval: Interval | None) -> str:
    return _ABSENT if interval is None else f"{100 * interval.low:.1f} to {interval.high:.1%}"


def _signed(interval: Interval | None) -> str:
    return _ABSENT if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"


def _number(value: float | None, form: str) -> str:
    return _ABSENT if value is None else form.format(value)


def _percentiles(times: Percentiles) -> str:
    return f"{times.p50:,.1f}/{times.p90:,.1f}/{times.p99:,.1f}"


def _estimated(memory: TrainingMemory) -> str:
    return _ABSENT if memory.estimated_bytes is None else format_size(memory.estimated_bytes)


def _date(seconds: float | None) -> str:
    return _ABSENT if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
