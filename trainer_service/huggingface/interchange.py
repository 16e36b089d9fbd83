"""Imports GPT-2 folders in Hugging Face's layout as versions, and exports versions as such folders."""

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
from shared.registry.manifest import IMPORTED, VersionManifest
from shared.registry.registry import Registry
from shared.registry.retention import prune
from shared.text import excerpt
from trainer_service.huggingface.gpt2 import CONFIG_FILE, read_config, read_model, write_model
from trainer_service.huggingface.gpt2_tokenizer import read_tokenizer, write_tokenizer
from trainer_service.jobs.specs import TrainSpec, new_run
from trainer_service.settings import TrainerSettings
from trainer_service.text.corpus import DatasetSpec, absolute
from trainer_service.text.tokens import prepare
from trainer_service.training.batches import TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.evaluate import EvaluationSet, evaluate
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers
from trainer_service.versions import publish

# Entries that a file system makes in its root folder.
_OF_A_NEW_DISK = frozenset({"lost+found", ".DS_Store"})

# Receives the stage of the work and the share of it that is done, from 0 to 1.
Report = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Imported:
    """An imported version, and notices for the user."""

    version: VersionManifest
    notices: tuple[str, ...]


def import_folder(
    directory: Path, data: DatasetSpec, settings: TrainerSettings, workers: Workers, report: Report
) -> Imported:
    """Publishes the model of a folder as a version, and writes a state from which training continues it: at step 0,
    with the optimizer's moments at zero.

    Its loss is measured on the held-out part of the data set, and its training loss on one batch of the training text.
    Raises the errors of `read_config`, `read_tokenizer`, `read_model` and `prepare`, `InvalidArgument` if a loss is not
    finite, and `FailedPrecondition` if the disk is full.
    """
    data = absolute(data)
    report("reading the model", None)
    published = read_config(directory)
    tokenizer = read_tokenizer(directory, published.gpt.vocabulary_size)
    cut = published.gpt.vocabulary_size - tokenizer.vocabulary_size
    config = _training_config(replace(published.gpt, vocabulary_size=tokenizer.vocabulary_size), tokenizer)
    model = read_model(directory, published.gpt, tokenizer.vocabulary_size)

    # Only one batch of the training text is needed.
    one_batch = replace(config, max_train_tokens=config.tokens_per_step + 1)
    prepared = prepare(data, one_batch, settings.directories.data, report, tokenizer)
    trainer = Trainer(config, TrainingText(prepared.train, tokenizer.end_token), workers)
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
            f"The model in {directory} has a loss of {held_out.nats_per_token} on the held-out text and of "
            f"{trainer.training_loss} on the training text, but both must be finite."
        )
    trainer.record_evaluation(held_out.nats_per_token)

    report("writing the version", None)
    spec = TrainSpec(new_run(IMPORTED), IMPORTED, config, data, resume=None)
    registry = settings.open_registry()
    registry.sweep()
    fence = registry.take_over(spec.run)
    # The state comes first, so that training can continue every version.
    registry.write_state(fence, trainer.step, trainer.save)
    version = publish(registry, fence, spec, prepared, trainer, evaluation_set, held_out)
    prune(registry, settings.retention)
    notices = prepared.notices + published.notices
    if cut:
        notices += (
            f"The model has {published.gpt.vocabulary_size} tokens, but the tokenizer has {tokenizer.vocabulary_size}: "
            f"the import drops the last {cut} rows of the embedding, which no text uses.",
        )
    if published.end_tokens not in ((), (tokenizer.end_token,)):
        ids = excerpt(", ".join(map(str, published.end_tokens[:10])))
        notices += (f"eos_token_id is {ids}, but the tokenizer's last token, {tokenizer.end_token}, ends a text.",)
    return Imported(version, notices)


def export_version(number: int, directory: Path, registry: Registry) -> list[Path]:
    """Writes a version's model and tokenizer into a new or empty folder, completely or not at all; returns the files.

    An existing folder may be a mount, so it is filled and never replaced. Raises `AlreadyExists` if the folder is not
    empty, `NotFound` or `CorruptCheckpoint` if the version is missing or damaged, `FailedPrecondition` if the folder
    cannot be written, and `InvalidArgument` if GPT-2's files cannot describe the tokenizer.
    """
    version = registry.version(number)
    target = directory.resolve()
    with _writing(directory):
        exists = target.exists()
        if exists and not (target.is_dir() and {path.name for path in target.iterdir()} <= _OF_A_NEW_DISK):
            raise AlreadyExists(f"{directory} exists and is not empty; name a new or an empty folder.")
    source = registry.verified(version)
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
    """Moves files into a folder, and removes the moved files if that fails. config.json comes last, because without it
    the folder is not a model."""
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
    """Returns the default values for continuing an imported version: fine-tuning at a low rate."""
    return TrainingConfig(
        tokenizer="gpt2" if tokenizer.name == "gpt2" else "bpe",
        max_steps=1000,
        batch_size=4,
        learning_rate=5e-5,
        warmup_steps=100,
        **gpt.to_dict(),  # type: ignore[arg-type]
    )
