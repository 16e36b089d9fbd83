"""Writes one model with random weights in every layout: as a version, for transformers, and for CTranslate2."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

from shared.errors import InvalidArgument
from shared.gpt.config import GPTConfig, count_parameters
from shared.gpt.tokenizer import PATTERN, Tokenizer, load_gpt2
from shared.registry.manifest import FileRecord, VersionManifest
from shared.service.settings import Directories
from tests.benchmarks.side_by_side import ROOT
from tests.registries import disk_registry
from tests.shared.registry.scenarios import RUN, make_manifest
from trainer_service.presets import find_preset

VERSION = 1
GPT2_TOKENS = 50257


@dataclass(frozen=True)
class Checkpoint:
    """A folder with one model in every layout."""

    folder: Path

    @property
    def directories(self) -> Directories:
        """The folder for GPTLOOP_VAR of a server; its registry holds the model as version 1."""
        return Directories(self.folder / "var")

    @property
    def version(self) -> Path:
        """The folder of the version."""
        return self.directories.registry / "versions" / str(VERSION)

    @property
    def exported(self) -> Path:
        """The model in Hugging Face's layout."""
        return self.folder / "exported"

    @property
    def converted(self) -> Path:
        """The model in CTranslate2's layout, in fp32."""
        return self.folder / "ctranslate2"

    @property
    def config(self) -> GPTConfig:
        """The shape of the model."""
        return GPTConfig.from_dict(json.loads((self.version / "config.json").read_bytes()))

    @classmethod
    def make(cls, folder: Path, preset: str, *, for_ctranslate2: bool = False) -> "Checkpoint":
        """Writes a model with the shape of a preset into an empty folder. Its head is tied, as in mlx-lm's GPT-2.

        Other processes write it, so that neither MLX nor PyTorch stays in the memory of this one. Raises
        `InvalidArgument` for an unknown preset.
        """
        find_preset(preset)
        checkpoint = cls(folder)
        checkpoint.directories.var.mkdir(parents=True)
        # Compiled kernels outlive the run, as in the other benchmarks.
        kernels = ROOT / ".pytest_cache" / "benchmarks"
        kernels.mkdir(parents=True, exist_ok=True)
        checkpoint.directories.cache.symlink_to(kernels)
        _run("tests.benchmarks.checkpoint", str(folder), preset)
        if for_ctranslate2:
            converter = "ctranslate2.converters.transformers"
            _run(converter, "--model", str(checkpoint.exported), "--output_dir", str(checkpoint.converted))
        return checkpoint


def tokenizer_for(vocabulary_size: int) -> Tokenizer:
    """Returns GPT-2's tokenizer if the size is its own, or else one of single bytes and pairs of bytes, letters first.

    Raises `InvalidArgument` if the size is less than the number of bytes or more than the number of pairs allows.
    """
    if vocabulary_size == GPT2_TOKENS:
        return load_gpt2()
    pairs = vocabulary_size - 257
    if not 0 <= pairs <= 256 * 256:
        raise InvalidArgument(f"vocabulary_size is {vocabulary_size}, but must be from 257 to {257 + 256 * 256}.")
    letters = sorted(range(256), key=lambda value: not chr(value).isalpha() or value >= 128)
    return Tokenizer(
        "pairs",
        PATTERN,
        [*(bytes([value]) for value in range(256)), *islice(map(bytes, product(letters, letters)), pairs)],
    )


def _run(module: str, *arguments: str) -> None:
    # All files are local, so nothing may ask the hub.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *arguments]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"{answer.stderr}python -m {module} ended with exit code {answer.returncode}.")


def main() -> None:
    import mlx.core as mx
    import numpy as np

    from shared.gpt.model import GPT
    from shared.version_format import write_version
    from tests.fakes import loss_of
    from trainer_service.huggingface.interchange import export_version

    checkpoint = Checkpoint(Path(sys.argv[1]))
    config = replace(find_preset(sys.argv[2]).gpt, tied_head=True)
    tokenizer = tokenizer_for(config.vocabulary_size)
    mx.random.seed(1)
    model = GPT(config)
    # Few and short windows, so that a server examines them quickly, but enough that int8 moves their loss by less than
    # the tolerance of its gate.
    windows = np.arange(4 * 65, dtype=np.uint16).reshape(4, 65)
    claimed_loss = loss_of(model, windows)

    def write(directory: Path) -> None:
        write_version(directory, model, tokenizer, windows)

    def manifest(number: int, files: tuple[FileRecord, ...]) -> VersionManifest:
        return make_manifest(
            number,
            files,
            model=config.to_dict(),
            parameters=count_parameters(config).total,
            tokenizer=tokenizer.name,
            tokenizer_digest=tokenizer.digest,
            claimed_loss=claimed_loss,
        )

    registry = disk_registry(checkpoint.directories.registry)
    published = registry.publish_version(registry.take_over(RUN), write, manifest)
    assert published.version == VERSION
    export_version(VERSION, checkpoint.exported, registry)


if __name__ == "__main__":
    main()
