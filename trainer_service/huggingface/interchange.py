"""Models from elsewhere as versions, and versions as folders for elsewhere: GPT-2 in Hugging Face's layout."""

import math
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from shared import version_format
from shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from shared.gpt.config import GPTConfig
from shared.gpt.model import parameters_of
from shared.gpt.tokenizer import Tokenizer
from shared.registry.commit import sync
from shared.registry.fence import Fence
from shared.registry.manifest import IMPORTED, VersionManifest
from shared.registry.retention import Retention, prune
from shared.registry.store import Registry
from shared.service.settings import Directories
from shared.text import excerpt
from trainer_service.huggingface.gpt2 import CONFIG_FILE, read_config, read_model, write_model
from trainer_service.huggingface.gpt2_tokenizer import read_tokenizer, write_tokenizer
from trainer_service.jobs.spec import JobSpec, new_run
from trainer_service.training.config import TrainingConfig
from trainer_service.training.corpus import DatasetSpec, absolute
from trainer_service.training.evaluate import EvaluationSet, evaluate
from trainer_service.training.tokens import prepare
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers
from trainer_service.versions import publish

# What a file system puts into its own root.
_OF_A_NEW_DISK = frozenset({"lost+found", ".DS_Store"})

# Tells a stage of the work, and how much of it is done, from 0 to 1.
Report = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Imported:
    """A version that was made, and sentences that a person should see."""

    version: VersionManifest
    notices: tuple[str, ...]


def import_folder(
    directory: Path,
    data: DatasetSpec,
    directories: Directories,
    retention: Retention,
    workers: Workers,
    report: Report,
) -> Imported:
    """Publishes the model of a folder as a version, judged on the held-out part of a data set, with a state from which
    training continues it: at step 0, with the optimizer's moments at zero.

    Its training loss is that of one batch of the training text. Raises as `read_config`, `read_tokenizer`, `read_model`
    and `prepare` do, `InvalidArgument` where a loss is not finite, and `FailedPrecondition` where the disk is full.
    """
    data = absolute(data)
    report("reading the model", None)
    published = read_config(directory)
    tokenizer = read_tokenizer(directory, published.gpt.vocabulary_size)
    cut = published.gpt.vocabulary_size - tokenizer.vocabulary_size
    config = _training_config(replace(published.gpt, vocabulary_size=tokenizer.vocabulary_size), tokenizer)
    model = read_model(directory, published.gpt, tokenizer.vocabulary_size)

    # Of the training text, no more than the one batch.
    few = replace(config, max_train_tokens=config.tokens_per_step + 1)
    prepared = prepare(data, few, directories.data, lambda each: report(each.stage, each.fraction), tokenizer)
    trainer = Trainer(config, prepared.train, workers)
    trainer.model.load_weights(list(parameters_of(model).items()))
    report("measuring the loss", None)
    training_set, evaluation_set = (
        EvaluationSet.from_tokens(tokens, tokenizer, windows=windows, context_length=config.context_length)
        for tokens, windows in ((prepared.train, config.batch_size), (prepared.validation, config.evaluation_windows))
    )
    trainer.training_loss = evaluate(trainer.model, training_set, config.batch_size, workers).nats_per_token
    held_out = evaluate(
        trainer.model, evaluation_set, config.batch_size, workers, partial(report, "measuring the loss")
    )
    if not math.isfinite(trainer.training_loss + held_out.nats_per_token):
        raise InvalidArgument(
            f"The model in {directory} cannot be used: its loss is {held_out.nats_per_token} on the held-out text and "
            f"{trainer.training_loss} on the training text, but both must be finite."
        )
    trainer.record_evaluation(held_out.nats_per_token)

    report("writing the version", None)
    spec = JobSpec(new_run(IMPORTED), IMPORTED, config, data, resume=None)
    registry = Registry(directories.registry)
    registry.sweep()
    fence = Fence.raise_for(registry.run_directory(spec.run))
    # The state first, so that there is no version which cannot be continued.
    registry.write_state(fence, spec.run, trainer.step, trainer.save)
    version = publish(registry, fence, spec, prepared, trainer, evaluation_set, held_out)
    prune(registry, retention)
    notices = prepared.notices + published.notices
    if cut:
        notices += (
            f"The model has {published.gpt.vocabulary_size} tokens, the tokenizer {tokenizer.vocabulary_size}: the "
            f"last {cut} rows of the embedding, which no text uses, are left out.",
        )
    if published.end_tokens not in ((), (tokenizer.end_token,)):
        ids = excerpt(", ".join(map(str, published.end_tokens[:10])))
        notices += (f"eos_token_id is {ids}, but a text ends with the tokenizer's last token, {tokenizer.end_token}.",)
    return Imported(version, notices)


def export_version(number: int, directory: Path, registry: Registry) -> list[Path]:
    """Writes a version's model and tokenizer into a new or empty folder, all of it or nothing; returns its files.

    A folder that exists may be a mount, so it is filled and never replaced. Raises `AlreadyExists` where the folder
    holds something, `NotFound` or `CorruptCheckpoint` for a version that is not there or not whole,
    `FailedPrecondition` where the folder cannot be written, and `InvalidArgument` for a tokenizer that GPT-2's files
    cannot describe.
    """
    version = registry.version(number)
    target = directory.resolve()
    with _writing(directory):
        exists = target.exists()
        if exists and not (target.is_dir() and {path.name for path in target.iterdir()} <= _OF_A_NEW_DISK):
            raise AlreadyExists(f"{directory} is there already and not empty; name a new or an empty folder.")
    registry.verify(version)
    source = registry.version_directory(number)
    tokenizer = version_format.read_tokenizer(source)
    model = version_format.read_model(source, GPTConfig.from_dict(version.model))
    name = f".{target.name}.{secrets.token_hex(4)}.partial"
    staging = (target if exists else target.parent) / name
    try:
        with _writing(directory):
            staging.mkdir(parents=True)
            write_model(model, tokenizer.end_token, staging)
            write_tokenizer(tokenizer, model.config.context_length, staging)
            for path in (*staging.iterdir(), staging):
                sync(path)
            names = sorted(path.name for path in staging.iterdir())
            if exists:
                _move_files(staging, target)
            else:
                staging.rename(target)
                sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [target / name for name in names]


def _move_files(staging: Path, target: Path) -> None:
    """Moves files into a folder, and those that were moved out of it again if that fails; config.json comes last, and
    without it the folder is no model."""
    moved: list[Path] = []
    try:
        for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            path.rename(target / path.name)
            moved.append(target / path.name)
        sync(target)
    except OSError:
        for path in reversed(moved):
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedPrecondition(f"{directory} cannot be written: {error.strerror}.") from error


def _training_config(gpt: GPTConfig, tokenizer: Tokenizer) -> TrainingConfig:
    """What continues an imported version where nothing else is set: a fine-tuning at a low rate."""
    return TrainingConfig(
        tokenizer="gpt2" if tokenizer.name == "gpt2" else "bpe",
        max_steps=1000,
        batch_size=4,
        learning_rate=5e-5,
        warmup_steps=100,
        **gpt.to_dict(),  # type: ignore[arg-type]
    )
