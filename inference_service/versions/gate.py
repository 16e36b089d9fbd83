"""The checks of a version before it serves: its files are whole and fit together, and its loss is as it claims."""

import math
from dataclasses import dataclass

from inference_service.engine.examination import Window
from shared.decoding.weight_format import WeightFormat
from shared.errors import (
    CorruptCheckpoint,
    FailedPrecondition,
    IncompleteCheckpoint,
    InvalidArgument,
    NotFound,
    UnreadableCheckpoint,
)
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from shared.gpt.weights import NotFiniteWeights
from shared.registry.findings import CORRUPT, LOSS_MISMATCH
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from shared.version_format import SERVED_FILES, read_model, read_tokenizer, read_windows

# Nats a token by which the loss that a server measures may differ from the one that training measured: on another
# device, in other formats.
TOLERANCE = 0.02


class Refused(FailedPrecondition):
    """A version must not serve, for a `reason` in a word. `loss` is that of its held-out windows, if it is known, and
    `stands_on` as in `Finding`."""

    def __init__(self, reason: str, clause: str, loss: float | None = None, stands_on: str | None = None) -> None:
        super().__init__(clause)
        self.reason = reason
        self.loss = loss
        self.stands_on = stands_on


@dataclass(frozen=True)
class Content:
    """A version's files, read and compared with its manifest; every array is evaluated."""

    model: GPT
    tokenizer: Tokenizer
    windows: tuple[Window, ...]


def read_content(registry: Registry, manifest: VersionManifest) -> Content:
    """Reads a version.

    Raises `Refused` if it cannot serve, `IncompleteCheckpoint` if it lacks files, `NotFound`, `StoreFailed` or
    `UnreadableCheckpoint` if it cannot be read, and `OSError` if memory is short.
    """
    try:
        # Before the files are read, so that a change meanwhile shows.
        state = registry.store.state(f"versions/{manifest.version}")
        directory = registry.verified(manifest)
    except (IncompleteCheckpoint, UnreadableCheckpoint):
        raise  # the version is not to blame
    except CorruptCheckpoint as error:
        raise Refused(CORRUPT, _clause(error), stands_on=state) from None
    missing = SERVED_FILES - {record.name for record in manifest.files}
    if missing:
        raise Refused("unfit", f"it has no {', '.join(sorted(missing))}")
    try:
        config = GPTConfig.from_dict(manifest.model)
        tokenizer = read_tokenizer(directory)
        if tokenizer.vocabulary_size != config.vocabulary_size:
            raise Refused(
                "unfit",
                f"its tokenizer has {tokenizer.vocabulary_size} tokens, but its model has {config.vocabulary_size}",
            )
        windows = tuple(tuple(window) for window in read_windows(directory, config).tolist())
        return Content(read_model(directory, config), tokenizer, windows)
    except NotFiniteWeights as error:
        raise Refused("not_finite", _clause(error)) from None
    except (CorruptCheckpoint, InvalidArgument, TypeError) as error:
        if isinstance(error.__cause__, OSError | RuntimeError):
            # The files are whole, so memory is short, or the disk fails.
            raise OSError(str(error.__cause__)) from error
        if not registry.store.exists(f"versions/{manifest.version}"):
            raise NotFound(f"Version {manifest.version} was removed from the registry.") from None
        raise Refused("unfit", _clause(error)) from None


def check_loss(manifest: VersionManifest, loss: float, weights: WeightFormat) -> None:
    """Compares the loss of the held-out windows, as the version would serve them, with its claim; raises `Refused`."""
    if not math.isfinite(loss):
        raise Refused("not_finite", "its predictions of held-out text are not finite")
    if not abs(loss - manifest.claimed_loss) <= TOLERANCE:
        raise Refused(
            LOSS_MISMATCH,
            f"it claims a held-out loss of {manifest.claimed_loss:.4f} nats a token, but has {loss:.4f} as served in "
            f"{weights}",
            loss,
        )


def _clause(error: Exception) -> str:
    return str(error).removesuffix(".")
