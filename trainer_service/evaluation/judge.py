"""Carries out an evaluation: measures the absent sections of a record, and writes the record after each of them."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from shared.device.accelerator import Accelerator
from shared.errors import CorruptCheckpoint, InvalidArgument, NotFound
from shared.gpt.tokenizer import Tokenizer
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from shared.version_format import read_model, read_tokenizer
from trainer_service.evaluation.method import HeldOutText, Method
from trainer_service.evaluation.minimal_pairs import measure_pairs
from trainer_service.evaluation.record import Record, Subject
from trainer_service.evaluation.speed import measure_speed
from trainer_service.evaluation.text_quality import measure_text
from trainer_service.evaluation.texts import Texts
from trainer_service.evaluation.training_loss import measure_training_loss
from trainer_service.evaluation.writing import measure_writing
from trainer_service.text.sentence_pairs import read_pairs
from trainer_service.training.config import TrainingConfig
from trainer_service.training.workers import Workers

# The beginnings that a version continues, and how.
_PROMPTS, _PROMPT_TOKENS, _SEEDS = 16, 16, (1, 2)
_MAX_TOKENS, _TEMPERATURE = 128, 0.8

# Receives the name of the work and the share of it that is done; an exception from it ends the evaluation.
Report = Callable[[str, float], object]


class Judge:
    """Evaluates versions on given texts, in windows of `window` tokens; 0 stands for each version's context.

    Figures on quality have the same bits on a CPU whenever they are measured.
    """

    def __init__(self, registry: Registry, device: Accelerator, workers: Workers, report: Report) -> None:
        self._registry = registry
        self._device = device
        self._workers = workers
        self._report = report

    def quality(self, version: VersionManifest, texts: Texts, window: int = 0, since: float = 0.0) -> Record:
        """Measures the version on text and by what it writes, as far as its record lacks these sections.

        Sections that were measured before `since`, in seconds since the epoch, count as absent. Raises `NotFound` or
        `CorruptCheckpoint` if the version is missing or damaged, `InvalidArgument` for a window that is too long, and
        `FailedPrecondition` if the registry cannot be written. Sections that were written before an error stay.
        """
        folder = self._registry.fetch(version)
        config = TrainingConfig.from_dict(version.training)
        tokenizer = read_tokenizer(folder)
        method = _method(texts, tokenizer, self._device, window or config.context_length)
        if method.window > config.context_length:
            raise InvalidArgument(
                f"window is {window}, but version {version.version} sees at most {config.context_length} tokens."
            )
        record = self._stored(version, method).since(since)
        training = texts.training if texts.is_own and record.training is None else None
        if record.writing is not None and texts.training is not None and not record.writing.training_tokens:
            record = replace(record, writing=None)  # copies could not be measured before
        if record.text is not None and training is None and record.writing is not None:
            return record
        model = read_model(self._registry.verified(version), config.gpt)
        if record.text is None:
            text = measure_text(
                model,
                texts.held_out,
                tokenizer,
                window=method.window,
                stride=method.stride,
                workers=self._workers,
                report=self._progress("measuring the held-out loss"),
            )
            record = self.keep(record, "text", text=text, notes=texts.notes)
        assert record.text is not None
        if training is not None:
            loss = measure_training_loss(
                model,
                training,
                record.text,
                tokenizer,
                window=method.window,
                stride=method.stride,
                workers=self._workers,
                report=self._progress("measuring the training loss"),
            )
            record = self.keep(record, "training", training=loss, notes=texts.notes)
        if record.writing is None:
            writing = measure_writing(
                model,
                tokenizer,
                texts.held_out,
                texts.training,
                method,
                threads=self._device.threads,
                cache=self._device.cache,
                report=self._progress("writing continuations"),
            )
            record = self.keep(record, "writing", writing=writing, notes=texts.notes)
        return record

    def pairs(self, record: Record, paths: Sequence[Path]) -> Record:
        """Measures the minimal pairs of files, unless the record has them; raises the errors of `measure_pairs`."""
        known = {each.sha256 for each in record.pairs}
        absent = [path for path in paths if read_pairs(path).sha256 not in known]
        if not absent:
            return record
        version = self._registry.version(record.version.number)
        folder = self._registry.verified(version)
        model = read_model(folder, TrainingConfig.from_dict(version.training).gpt)
        for path in absent:
            progress = self._progress(f"comparing the pairs of {path.name}")
            measured = measure_pairs(model, read_tokenizer(folder), path, self._workers, progress)
            record = self.keep(record, "pairs", pairs=(*record.pairs, measured))
        return record

    def speed(self, record: Record, version: VersionManifest) -> Record:
        """Measures speed and memory, unless the record has them; raises `FailedPrecondition` if that fails."""
        if record.speed is not None:
            return record
        speed, memory = measure_speed(
            self._registry.fetch(version),
            TrainingConfig.from_dict(version.training),
            self._device.threads,
            self._progress("measuring speed and memory"),
        )
        return self.keep(record, "speed", speed=speed, memory=memory)

    def _progress(self, work: str) -> Callable[[float], object]:
        return lambda share: self._report(work, share)

    def _stored(self, version: VersionManifest, method: Method) -> Record:
        empty = Record(Subject(version.version, version.run, version.step, version.digest, version.parameters), method)
        try:
            record = Record.from_json(self._registry.evaluations.read(version.version, method.digest))
        except (NotFound, CorruptCheckpoint):
            return empty
        return replace(record, method=method) if record.version == empty.version else empty

    def keep(self, record: Record, section: str, **measured: object) -> Record:
        """Adds a section to a record, and to the file, whose other sections stay."""
        now = time.time()

        def added(to: Record) -> Record:
            return replace(to, measured_at=to.measured_at | {section: now}, **measured)  # type: ignore[arg-type]

        stored = self._stored(self._registry.version(record.version.number), record.method)
        self._registry.evaluations.write(record.version.number, record.method.digest, added(stored).to_json())
        return added(record)


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
        precision=_precision(device),
        device=device.backend,
        prompts=_PROMPTS,
        prompt_tokens=_PROMPT_TOKENS,
        seeds=_SEEDS,
        max_tokens=_MAX_TOKENS,
        temperature=_TEMPERATURE,
    )


def _precision(device: Accelerator) -> str:
    """Returns the type of the products: unless MLX_ENABLE_TF32 is 0, MLX rounds their factors to TF32 on CUDA."""
    rounds = device.backend == "cuda" and os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    return "tf32" if rounds else "float32"
