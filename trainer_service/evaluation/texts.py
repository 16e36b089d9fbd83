"""The texts on which a version is judged: a whole held-out split, and the text that it was trained on."""

from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import GptloopError
from shared.gpt.tokenizer import Tokenizer
from shared.registry.manifest import IMPORTED, VersionManifest
from trainer_service.text.corpus import DatasetSpec
from trainer_service.text.shared_tokens import SharedTokens
from trainer_service.text.tokens import PreparedData, Report, prepare
from trainer_service.training.batches import Tokens
from trainer_service.training.config import TrainingConfig
from trainer_service.versions import changed_text


@dataclass(frozen=True)
class Texts:
    """The held-out tokens (N,) with their name and the revision of their data set, and the training tokens (M,).

    `training` is None if that text is unknown or cannot be read; `notes` then say why. `is_own` says whether the
    held-out text is that of the version's training: only then does the difference of their losses mean overfitting.
    """

    held_out: Tokens
    name: str
    revision: str
    training: Tokens | None
    notes: tuple[str, ...]
    is_own: bool


def read_texts(
    version: VersionManifest,
    data: DatasetSpec,
    tokenizer: Tokenizer,
    directory: Path,
    report: Report,
    share: float | None = None,
    stories: int | None = None,
    shared: SharedTokens | None = None,
) -> Texts:
    """Returns the texts for a version, in tokens of its tokenizer.

    The held-out text is that of `data`, or of the version's own data if `data` is empty; without a split of its own, it
    is the `share` of the text, by default the share of the version's own training. Of a teacher's stories the first
    `stories` are read, or all of them. `shared` is as in `prepare`. Raises the errors of `prepare` for it; a problem
    with the training text is a note.
    """
    config = TrainingConfig.from_dict(version.training)
    share = share or config.validation_share
    own = DatasetSpec(version.dataset_files, version.validation_files).without_mixed
    # Stories that are mixed with other text are never held out, so versions with and without them compare.
    data = data.without_mixed

    def read(spec: DatasetSpec, config: TrainingConfig) -> PreparedData:
        return prepare(
            spec, config, directory, report, tokenizer, whole_validation=True, stories=stories, shared=shared
        )

    named = data if data.dataset or data.validation else own
    if named != own and named.validation:
        named = DatasetSpec((), named.validation)
    is_own = named == own and (bool(named.validation) or share == config.validation_share)
    # Of other data, only the held-out part is read.
    other = replace(config, max_train_tokens=config.context_length + 1, validation_share=share)
    held_out = read(named, config if is_own else other)
    notes = [*held_out.notices, *changed_text(version, named, held_out)]
    training: Tokens | None = None
    if not is_own:
        notes.append("The held-out text is not that of the version's training, so overfitting is not judged.")
    if version.preset == IMPORTED and version.step == 0:
        notes.append("The text that an imported version was trained on is unknown.")
    elif is_own:
        training = held_out.train
    else:
        try:
            training = read(own, config).train
        except GptloopError as error:
            notes.append(f"The training text cannot be read: {error}")
    if own.dataset != version.dataset_files:
        notes.append("The longest copy is searched in the training text without the teacher's stories.")
    return Texts(held_out.validation, held_out.held_out_source, held_out.revision, training, tuple(notes), is_own)
