"""Publishes a version of a model in training: its files and its manifest."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.gpt.config import count_parameters
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord, TeacherRecord, VersionManifest
from shared.registry.registry import Registry
from shared.version_format import write_version
from trainer_service.jobs.specs import TrainSpec
from trainer_service.text.corpus import DatasetSpec
from trainer_service.text.tokens import PreparedData
from trainer_service.training.evaluate import EvaluationSet, HeldOutLoss
from trainer_service.training.trainer import Trainer


def publish(
    registry: Registry,
    fence: Fence,
    spec: TrainSpec,
    data: PreparedData,
    trainer: Trainer,
    evaluation_set: EvaluationSet,
    held_out: HeldOutLoss,
    teachers: Sequence[VersionManifest] = (),
) -> VersionManifest:
    """Publishes the current model, which `teachers` have taught, under the next number.

    Raises `RunOwnershipLost` if another process owns the run.
    """

    def write(folder: Path) -> None:
        write_version(folder, trainer.model, data.tokenizer, evaluation_set.carried)

    def manifest(number: int, files: tuple[FileRecord, ...]) -> VersionManifest:
        return VersionManifest(
            version=number,
            run=spec.run,
            step=trainer.step,
            parent=spec.resume,
            created_at=time.time(),
            preset=spec.preset,
            model=spec.config.gpt.to_dict(),
            parameters=count_parameters(spec.config.gpt).total,
            training=spec.config.to_dict(),
            tokenizer=data.tokenizer.name,
            tokenizer_digest=data.tokenizer.digest,
            dataset=data.source,
            dataset_revision=data.revision,
            dataset_files=spec.data.dataset,
            validation_files=spec.data.validation,
            evaluation_set=evaluation_set.digest,
            training_loss=trainer.training_loss,
            validation_loss=held_out.nats_per_token,
            bits_per_byte=held_out.bits_per_byte,
            claimed_loss=held_out.claimed,
            files=files,
            notes=spec.notes,
            teachers=tuple(TeacherRecord(each.version, each.digest) for each in teachers),
        )

    return registry.publish_version(fence, write, manifest)


def changed_text(version: VersionManifest, named: DatasetSpec, data: PreparedData) -> Iterator[str]:
    """Yields a sentence if the data set and files of a version, given again, now contain other text.

    The stories that are mixed with the other text may be left out: the revision begins with that of the other text.
    """
    own = DatasetSpec(version.dataset_files, version.validation_files)
    if named in (own, own.without_mixed) and not version.dataset_revision.startswith(data.revision):
        yield f"{data.source} has changed, or is read in another way, since version {version.version} was made."
