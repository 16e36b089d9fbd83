"""The work of an evaluation job."""

from pathlib import Path

from shared.errors import FailedPrecondition
from shared.version_format import read_tokenizer
from trainer_service.evaluation.judge import Judge
from trainer_service.evaluation.record import Record
from trainer_service.evaluation.texts import read_texts
from trainer_service.jobs.attempt import Attempt, preparation_report
from trainer_service.jobs.events import Evaluation, Notice
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.training.workers import Workers


def evaluate_version(spec: EvaluateSpec, attempt: Attempt) -> None:
    """Measures what is absent from the record of a version, and keeps it in the registry.

    An attempt that follows an interrupted one measures only what that one had not finished. Raises the errors of
    `read_texts` and `Judge`, and `Stopped` if the attempt has to end.
    """
    registry = attempt.open_registry()
    version = registry.version(int(spec.version)) if spec.version.isdecimal() else registry.resolve(spec.version)
    tokenizer = read_tokenizer(registry.version_directory(version.version))
    report = preparation_report(attempt)
    texts = read_texts(version, spec.data, tokenizer, attempt.directories.data, report)
    for text in texts.notes:
        attempt.emit(Notice(text))
    with Workers(attempt.device.threads) as workers:
        judge = Judge(registry, attempt.device, workers, report)
        record = judge.quality(version, texts, spec.window, spec.since)
        record = judge.pairs(record, [Path(name) for name in spec.pairs])
        if spec.speed:
            try:
                record = judge.speed(record, version)
            except FailedPrecondition as error:
                attempt.emit(Notice(f"{error} The evaluation has no speed and memory."))
    attempt.emit(evaluation_event(record))


def evaluation_event(record: Record) -> Evaluation:
    """Returns the event that says that a record is complete."""
    text = record.text
    assert text is not None
    return Evaluation(
        record.version.step,
        None,
        text.nats_per_token,
        text.bits_per_byte,
        version=record.version.number,
        windows=record.method.windows,
        text=record.method.text.name,
        method_digest=record.method.digest,
    )
