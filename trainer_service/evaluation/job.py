"""Measures the loss of a version on other text than training did, or on more of it."""

import json
import time
from dataclasses import replace

from shared.version_format import read_model, read_tokenizer
from trainer_service.jobs.attempt import Attempt, preparation_report
from trainer_service.jobs.events import Evaluation, Notice
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.text.corpus import DatasetSpec
from trainer_service.text.tokens import prepare
from trainer_service.training.config import TrainingConfig
from trainer_service.training.evaluate import EvaluationSet, evaluate
from trainer_service.training.workers import Workers
from trainer_service.versions import changed_text

# The most windows that are measured.
_WINDOWS = 1000


def evaluate_version(spec: EvaluateSpec, attempt: Attempt) -> None:
    """Measures the loss of a version on up to 1000 windows of held-out text, and keeps it in the registry.

    If validation files are given, no other text is read. Raises `NotFound` or `CorruptCheckpoint` if the version does
    not exist or is damaged, the errors of `prepare`, and `Stopped` if the attempt has to end.
    """
    registry = attempt.open_registry()
    version = registry.version(int(spec.version)) if spec.version.isdecimal() else registry.resolve(spec.version)
    registry.verify(version)
    directory = registry.version_directory(version.version)
    tokenizer = read_tokenizer(directory)
    config = TrainingConfig.from_dict(version.training)
    wanted = replace(
        config,
        max_train_tokens=config.context_length + 1,
        max_validation_tokens=_WINDOWS * config.context_length + 1,
    )

    report = preparation_report(attempt)
    if spec.data.validation:
        data = DatasetSpec((), spec.data.validation)
    elif spec.data.dataset:
        data = spec.data
    else:
        data = DatasetSpec(version.dataset_files, version.validation_files)
    prepared = prepare(data, wanted, attempt.directories.data, report, tokenizer)
    for text in (*prepared.notices, *changed_text(version, data, prepared)):
        attempt.emit(Notice(text))
    evaluation_set = EvaluationSet.from_tokens(
        prepared.validation, tokenizer, windows=_WINDOWS, context_length=config.context_length
    )
    model = read_model(directory, config.gpt)
    with Workers(attempt.device.threads) as workers:
        held_out = evaluate(
            model, evaluation_set, config.batch_size, workers, lambda share: report("measuring the loss", share)
        )
    result = {
        "version": version.version,
        "dataset": prepared.held_out_source,
        "dataset_revision": prepared.revision,
        "evaluation_set": evaluation_set.digest,
        "windows": len(evaluation_set.windows),
        "validation_loss": held_out.nats_per_token,
        "bits_per_byte": held_out.bits_per_byte,
        "created_at": time.time(),
    }
    registry.evaluations.write(version.version, evaluation_set.digest, json.dumps(result, indent=2))
    attempt.emit(
        Evaluation(
            version.step,
            None,
            held_out.nats_per_token,
            held_out.bits_per_byte,
            version=version.version,
            windows=len(evaluation_set.windows),
            text=prepared.held_out_source,
        )
    )
