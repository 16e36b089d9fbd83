"""The work of an evaluation job."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shared.errors import FailedPrecondition
from shared.registry.manifest import VersionManifest
from shared.service import traces
from shared.version_format import read_tokenizer
from trainer_service.distillation.judgement import judge_version
from trainer_service.evaluation.judge import Judge
from trainer_service.evaluation.record import Judged, Record
from trainer_service.evaluation.texts import Texts, read_texts
from trainer_service.evaluation.verdict import CONTROL, Contender, judge_rivals
from trainer_service.jobs.attempt import Attempt, preparation_report
from trainer_service.jobs.events import Evaluation, Notice
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.teachers import of_other_text, taught_by
from trainer_service.text.corpus import DatasetSpec
from trainer_service.text.tokens import Report
from trainer_service.training.config import TrainingConfig
from trainer_service.training.workers import Workers


def evaluate_version(spec: EvaluateSpec, attempt: Attempt) -> None:
    """Measures what is absent from the records of a version and its rivals, and keeps the verdict in the registry.

    An attempt that follows an interrupted one measures only what that one had not finished. Raises the errors of
    `read_texts` and `Judge`, `Stopped` if the attempt has to end, and `Paused` if the large teacher has to be asked
    later.
    """
    registry = attempt.open_registry()
    version = registry.named(spec.version)
    rivals = {role: registry.named(word) for role, word in spec.rivals.items()}
    # Later attempts evaluate the same versions, whatever the labels name then.
    numbers = {role: str(each.version) for role, each in rivals.items()}
    attempt.settle(replace(spec, version=str(version.version), rivals=numbers))
    window = spec.window or min(int(each.model["context_length"]) for each in (version, *rivals.values()))
    report = preparation_report(attempt)
    with Workers(attempt.device.threads) as workers:
        judge = Judge(registry, attempt.device, workers, report)

        def quality(each: VersionManifest) -> Record:
            texts = _texts(each, version, spec, attempt, report)
            if each is version:
                for text in texts.notes:
                    attempt.emit(Notice(text))
            with traces.span("measure text", {"gptloop.version": each.version}):
                return judge.quality(each, texts, window, spec.since)

        record = quality(version)
        contenders = [Contender(role, quality(each), _tokens(each)) for role, each in rivals.items()]
        record = judge.pairs(record, [Path(name) for name in spec.pairs])
        if spec.speed:
            try:
                with traces.span("measure speed"):
                    record = judge.speed(record, version)
            except FailedPrecondition as error:
                attempt.emit(Notice(f"{error} The evaluation has no speed and memory."))
        if spec.judge_usd:
            beside = [each.record for each in contenders]
            if judged := judge_version(record, beside, spec.judge_cap_usd, attempt):
                record = judge.keep(record, "judged", judged=_merged(record.judged, judged))
        if contenders and (CONTROL in rivals or spec.promote):
            verdict = record.verdict
            # Only once and after all pauses: an operator may have chosen another stable version since.
            if verdict is None or not attempt.job or verdict.job != attempt.job:
                doubts = tuple(of_other_text(taught_by(version, registry), version.dataset_revision))
                ours = Contender("", record, _tokens(version))
                found = judge_rivals(ours, contenders, spec.promote, doubts)
                verdict = replace(found, job=attempt.job)
                # First, so that an attempt that dies between the two promotes the version again.
                if verdict.promoted:
                    registry.decisions.set_stable(version.version)
                record = judge.keep(record, "verdict", verdict=verdict)
            attempt.emit(Notice(verdict.sentence))
    attempt.emit(evaluation_event(record))


def _merged(kept: Sequence[Judged], judged: Sequence[Judged]) -> tuple[Judged, ...]:
    """Returns one judgement for each rival, the newer one if there are two."""
    return tuple({each.rival.digest: each for each in (*kept, *judged)}.values())


def _texts(
    version: VersionManifest, judged: VersionManifest, spec: EvaluateSpec, attempt: Attempt, report: Report
) -> Texts:
    """Returns the texts for a version, with the held-out text of the version that is judged."""
    data = spec.data
    if not (data.dataset or data.validation):
        data = DatasetSpec(judged.dataset_files, judged.validation_files)
    tokenizer = read_tokenizer(attempt.open_registry().fetch(version))
    share = TrainingConfig.from_dict(judged.training).validation_share
    return read_texts(version, data, tokenizer, attempt.directories.data, report, share, shared=attempt.shared_tokens())


def _tokens(version: VersionManifest) -> int:
    """Returns the number of target tokens in the whole schedule of a version's run."""
    config = TrainingConfig.from_dict(version.training)
    return config.max_steps * config.tokens_per_step


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
