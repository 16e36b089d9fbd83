"""Carries out an evaluation: measures the absent sections of a record, and writes the record after each of them."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from shared.device.accelerator import Accelerator
from shared.errors import CorruptCheckpoint, InvalidArgument, NotFound
from shared.gpt.tokenizer import Tokenizer
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry
from shared.version_format import read_model, read_tokenizer
from trainer_service.evaluation.minimal_pairs import measure_pairs
from trainer_service.evaluation.record import HeldOutText, Method, Record, Subject
from trainer_service.evaluation.speed import measure_speed
from trainer_service.evaluation.text_quality import measure_text
from trainer_service.evaluation.texts import Texts
from trainer_service.evaluation.training_loss import measure_training_loss
from trainer_service.evaluation.writing import measure_writing
from trainer_service.training.config import TrainingConfig
from trainer_service.training.workers import Workers

# The beginnings that a version continues, and how.
_PROMPTS, _PROMPT_TOKENS, _SEEDS = 16, 16, (1, 2)
_MAX_TOKENS, _TEMPERATURE = 128, 0.8

# Receives the name of the work and the share of it that is done; an exception from it ends the evaluation.
Report = Callable[[str, float], object]


def judge(
    version: VersionManifest,
    texts: Texts,
    registry: Registry,
    device: Accelerator,
    workers: Workers,
    report: Report,
    *,
    window: int = 0,
    since: float = 0.0,
    pairs: Sequence[Path] = (),
    speed: bool = True,
) -> Record:
    """Completes the record of a version and returns it.

    window: the tokens of a window; 0 stands for the version's context.
    since: sections that were measured before this time, in seconds since the epoch, are measured again.
    pairs: files of minimal pairs to measure besides.
    speed: whether to measure speed and memory too.

    Figures on quality have the same bits on a CPU whenever they are measured. Raises `NotFound` or `CorruptCheckpoint`
    if the version is missing or damaged, `InvalidArgument` for a window that is too long, and `FailedPrecondition` if
    the registry cannot be written; sections that were written before an error stay.
    """
    registry.verify(version)
    folder = registry.version_directory(version.version)
    config = TrainingConfig.from_dict(version.training)
    tokenizer = read_tokenizer(folder)
    method = _method(texts, tokenizer, device, window or config.context_length)
    if method.window > config.context_length:
        raise InvalidArgument(
            f"window is {window}, but version {version.version} sees at most {config.context_length} tokens at once."
        )
    record = _so_far(version, method, registry, since)

    def keep(section: str, **measured: object) -> None:
        nonlocal record
        times = record.measured_at | {section: time.time()}
        record = replace(record, measured_at=times, **measured)  # type: ignore[arg-type]
        registry.evaluations.write(version.version, method.digest, record.to_json())

    def progress(work: str) -> Callable[[float], object]:
        return lambda share: report(work, share)

    model = read_model(folder, config.gpt)
    if record.text is None:
        text = measure_text(
            model,
            texts.held_out,
            tokenizer,
            window=method.window,
            stride=method.stride,
            workers=workers,
            report=progress("measuring the held-out loss"),
        )
        keep("text", text=text, notes=texts.notes)
    assert record.text is not None
    if record.training is None and texts.training is not None:
        loss = measure_training_loss(
            model,
            texts.training,
            record.text,
            tokenizer,
            window=method.window,
            stride=method.stride,
            workers=workers,
            report=progress("measuring the training loss"),
        )
        keep("training", training=loss)
    if record.writing is None:
        writing = measure_writing(
            model,
            tokenizer,
            texts.held_out,
            texts.training,
            method,
            threads=device.threads,
            cache=device.cache,
            report=progress("writing continuations"),
        )
        keep("writing", writing=writing)
    for path in pairs:
        measured = measure_pairs(model, tokenizer, path, workers, progress(f"comparing the pairs of {path.name}"))
        others = tuple(each for each in record.pairs if each.name != measured.name)
        keep("pairs", pairs=(*others, measured))
    if speed and record.speed is None:
        found = measure_speed(folder, config, texts.training, workers, progress("measuring speed and memory"))
        keep("speed", speed=found[0], memory=found[1])
    return record


def _method(texts: Texts, tokenizer: Tokenizer, device: Accelerator, window: int) -> Method:
    held_out, end = texts.held_out, tokenizer.end_token
    text = HeldOutText(
        name=texts.name,
        revision=texts.revision,
        tokens=held_out.size,
        text_bytes=int(tokenizer.byte_lengths[held_out].sum()),
        documents=int((held_out == end).sum()) + int(held_out[-1] != end),
        digest=hashlib.sha256(held_out.tobytes()).hexdigest(),
    )
    return Method(
        text=text,
        tokenizer=tokenizer.digest,
        window=window,
        stride=max(window // 2, 1),
        precision="float32",
        device=device.backend,
        prompts=_PROMPTS,
        prompt_tokens=_PROMPT_TOKENS,
        seeds=_SEEDS,
        max_tokens=_MAX_TOKENS,
        temperature=_TEMPERATURE,
    )


def _so_far(version: VersionManifest, method: Method, registry: Registry, since: float) -> Record:
    subject = Subject(version.version, version.run, version.step, version.digest, version.parameters)
    try:
        record = Record.from_json(registry.evaluations.read(version.version, method.digest))
    except (NotFound, CorruptCheckpoint):
        return Record(subject, method)
    old = [section for section, at in record.measured_at.items() if at < since]
    emptied: dict[str, object] = {section: () if section == "pairs" else None for section in old}
    if "speed" in old:
        emptied["memory"] = None
    times = {section: at for section, at in record.measured_at.items() if section not in old}
    return replace(record, version=subject, measured_at=times, **emptied)  # type: ignore[arg-type]
