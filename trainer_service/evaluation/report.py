"""Makes a report of the records of several versions, and a summary for scripts. Loads no model framework."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from shared.registry.history import History
from trainer_service.evaluation.charts import decoding_speed, loss_by_position, loss_over_tokens, training_memory
from trainer_service.evaluation.comparison import Comparisons, by_method
from trainer_service.evaluation.record import Continuation, Judged, Record
from trainer_service.evaluation.tables import (
    comparison_table,
    grades_table,
    judged_table,
    memory_table,
    method_table,
    positions_table,
    quality_table,
    speed_table,
    verdict_table,
    versions_table,
    writing_table,
)
from trainer_service.evaluation.verdict import CONTROL
from trainer_service.evaluation.views.document import Block, Note, Passage, Plot, Report, Section, SideBySide

# What only the record holds: it is long, or said elsewhere in the summary.
_LEFT_OUT = {"unit_nats", "unit_tokens", "continuations"}


def build_report(records: Sequence[Record], comparisons: Comparisons, histories: Sequence[History]) -> Report:
    """Returns a report of at least one record; figures stand side by side only if their methods are equal."""
    return Report(
        title=f"Evaluation of {_versions(records)}",
        subtitle="Every figure comes from the records of the evaluations; a lower loss is better.",
        sections=tuple(section for section in _sections(records, comparisons, histories) if section.blocks),
    )


def summary(records: Sequence[Record], comparisons: Comparisons) -> dict[str, Any]:
    """Returns the figures of all records and comparisons as JSON has them, without arrays of units and texts."""
    versions = [{"method_digest": record.method.digest, **asdict(record)} for record in records]
    plain: dict[str, Any] = _plain({"versions": versions, "comparisons": [asdict(each) for each in comparisons.pairs]})
    return {**plain, "notes": list(comparisons.notes)}


def _sections(records: Sequence[Record], comparisons: Comparisons, histories: Sequence[History]) -> Iterator[Section]:
    groups = by_method(records)

    def each_method(title: str, blocks: Callable[[Sequence[Record]], Iterator[Block]]) -> Iterator[Section]:
        for group in groups:
            yield Section(title if len(groups) == 1 else f"{title}: {_versions(group)}", tuple(blocks(group)))

    notes = dict.fromkeys(note for record in records for note in record.notes)
    yield Section(
        "Versions", (versions_table(records), *map(Note, notes), *_plots(loss_over_tokens(histories, records)))
    )
    for record in (each for each in records if each.verdict):
        yield Section(f"Verdict on version {record.version.number}", tuple(_verdict(record, records)))
    yield Section("Comparison", tuple(_comparison(comparisons)))
    yield from each_method("Quality on held-out text", _quality)
    yield from each_method("Quality of what they write", _writing)
    yield from each_method("Judged by a large teacher", _judged)
    yield Section("Speed", tuple(_speed(_newest(records))))
    yield Section("Memory", tuple(_memory(_newest(records))))
    yield from each_method("Texts side by side", _texts)
    yield from each_method("Method", lambda group: iter((method_table(group[0]),)))


def _verdict(record: Record, records: Sequence[Record]) -> Iterator[Block]:
    assert record.verdict is not None
    yield verdict_table(record, records)
    yield Note(record.verdict.sentence)
    yield Note("A difference is that of the version from its rival in nats per token: below 0, the version is better.")
    if any(each.role == CONTROL for each in record.verdict.rivals):
        yield Note("The control was trained for as many tokens without the teacher.")


def _comparison(comparisons: Comparisons) -> Iterator[Block]:
    if comparisons.pairs:
        yield comparison_table(comparisons.pairs)
        yield Note(
            "A difference below 0 means that the version predicts the text better. The interval comes from the same "
            "documents or passages for both versions; if it contains 0, it cannot be told which one is better."
        )
    yield from map(Note, comparisons.notes)


def _quality(records: Sequence[Record]) -> Iterator[Block]:
    if any(record.text or record.training or record.pairs for record in records):
        yield quality_table(records)
    if any(record.text for record in records):
        yield positions_table(records)
    yield from _plots(loss_by_position(records))


def _writing(records: Sequence[Record]) -> Iterator[Block]:
    if any(record.writing for record in records):
        yield writing_table(records)
        yield Note(
            "Different n-grams are shares of all n-grams of tokens; a 4-gram is repeated if it occurred before in the "
            "same text. The longest copy is the longest run of tokens that also stands in the training text."
        )


def _judged(records: Sequence[Record]) -> Iterator[Block]:
    found = [(record.version.number, each) for record in records for each in record.judged]
    if not found:
        return
    yield judged_table(records)
    yield from (
        Note(f"There is no verdict on version {version} beside version {each.rival.number}: {each.no_verdict}")
        for version, each in found
        if each.no_verdict
    )
    yield Note(
        "The teacher reads two continuations of the same beginning, without knowing who wrote them, once in each "
        "order. A tie is half a win. The interval comes from resampling beginnings; if it contains 50 %, it cannot be "
        "told which version writes better."
    )
    yield grades_table(records)
    yield from map(Note, dict.fromkeys(_judge(each) for _, each in found))


def _judge(judged: Judged) -> str:
    """Says who judged, and what was not answered."""
    parts = [f"Judged by {judged.model} with the wording {judged.template}"]
    if judged.fingerprints:
        parts.append(f"configuration {', '.join(judged.fingerprints)}")
    if judged.unanswered:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in judged.unanswered.items())
        parts.append(f"questions without an answer: {reasons}")
    return f"{'; '.join(parts)}."


def _speed(records: Sequence[Record]) -> Iterator[Block]:
    if any(record.speed for record in records):
        yield speed_table(records)
        yield Note("Times are the median, the 90th and the 99th percentile.")
        yield from _plots(decoding_speed(records))


def _memory(records: Sequence[Record]) -> Iterator[Block]:
    if any(record.memory for record in records):
        yield memory_table(records)
        yield from _plots(training_memory(records))


def _texts(records: Sequence[Record]) -> Iterator[Block]:
    """Yields how the versions continued each beginning with each seed."""
    found: dict[tuple[str, int], list[Passage]] = {}
    for record in records:
        for each in record.writing.continuations if record.writing else ():
            author = f"version {record.version.number}"
            found.setdefault((each.prompt, each.seed), []).append(Passage(author, each.text, _remark(each)))
    for (prompt, _), passages in found.items():
        yield SideBySide(prompt, tuple(passages))


def _remark(each: Continuation) -> str:
    parts = [f"seed {each.seed}", f"{each.tokens:,} tokens", "ends by itself" if each.ended else "ends at the limit"]
    if each.copied is not None:
        parts.append(f"longest copy {each.copied:,} tokens")
    return ", ".join(parts)


def _plots(*plots: Plot | None) -> Iterator[Plot]:
    return (plot for plot in plots if plot is not None)


def _newest(records: Sequence[Record]) -> list[Record]:
    """Returns one record of each version, because speed and memory do not depend on the text."""
    return list({record.version.number: record for record in records}.values())


def _versions(records: Sequence[Record]) -> str:
    numbers = list(dict.fromkeys(str(record.version.number) for record in records))
    if len(numbers) == 1:
        return f"version {numbers[0]}"
    return f"versions {', '.join(numbers[:-1])} and {numbers[-1]}"


def _plain(value: Any) -> Any:
    """Leaves out what only the record holds, and numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key not in _LEFT_OUT}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
