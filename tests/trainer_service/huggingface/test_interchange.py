import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from inference_service.versions.gate import read_content
from shared.device.accelerator import Accelerator
from shared.errors import (
    AlreadyExists,
    CorruptCheckpoint,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from shared.gpt.config import GPTConfig, count_parameters
from shared.gpt.model import GPT, parameters_of
from shared.gpt.tokenizer import PATTERN, Tokenizer
from shared.gpt.weights import load_arrays
from shared.registry.registry import Registry
from shared.registry.retention import Retention
from shared.service.settings import Directories
from tests.fakes import byte_tokenizer, publish_tiny_version
from tests.registries import disk_registry, root_of, version_folder
from trainer_service.huggingface import interchange
from trainer_service.huggingface.gpt2 import read_config, read_model, write_model
from trainer_service.huggingface.gpt2_tokenizer import read_tokenizer, write_tokenizer
from trainer_service.huggingface.interchange import Imported, export_version, import_folder
from trainer_service.jobs.attempt import Attempt
from trainer_service.jobs.events import Event, RunStarted, VersionPublished
from trainer_service.jobs.requests import TrainRequest
from trainer_service.run import TrainingRun
from trainer_service.settings import read_settings
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.config import TrainingConfig
from trainer_service.training.loss import token_losses
from trainer_service.training.workers import Workers

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[3]
SHAPE = GPTConfig(
    layers=2, width=32, heads=2, hidden_width=64, context_length=16, vocabulary_size=257, tied_head=True, dropout=0.0
)


HERE = Accelerator("here", "cpu", "0", 0, Path())


def write_folder(directory: Path, config: GPTConfig = SHAPE, scale: float = 0.1) -> Path:
    """Writes a model with random weights, biases and norms, and a tokenizer of bytes."""
    mx.random.seed(11)
    model = GPT(config)
    model.load_weights(
        [(name, value + mx.random.normal(value.shape, scale=scale)) for name, value in parameters_of(model).items()]
    )
    directory.mkdir(exist_ok=True)
    write_model(model, 256, directory)
    write_tokenizer(byte_tokenizer(), config.context_length, directory)
    return directory


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    return Directories(tmp_path / "var")


@pytest.fixture
def registry(directories: Directories) -> Registry:
    return disk_registry(directories.registry)


@pytest.fixture
def data(tmp_path: Path) -> DatasetSpec:
    training, held_out = tmp_path / "training.txt", tmp_path / "held-out.txt"
    training.write_text("The fox and the owl counted sheep. " * 40)
    held_out.write_text("The owl and the sheep counted foxes. " * 40)
    return DatasetSpec((str(training),), (str(held_out),))


def imported(folder: Path, data: DatasetSpec, directories: Directories) -> Imported:
    settings = read_settings({"GPTLOOP_VAR": str(directories.var)})
    return import_folder(folder, data, settings, Workers(), lambda stage, fraction: None)


def same_weights(one: GPT, other: GPT) -> bool:
    expected = parameters_of(other)
    return all(mx.array_equal(array, expected[name]) for name, array in parameters_of(one).items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_server_reads_the_weights_and_tokenizer_of_an_imported_version(
    tied: bool, tmp_path: Path, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    config = GPTConfig.from_dict(SHAPE.to_dict() | {"tied_head": tied})
    folder = write_folder(tmp_path / "gpt2", config)
    version = imported(folder, data, directories).version
    assert (version.version, version.step, version.parent, version.preset) == (1, 0, None, "imported")
    assert version.parameters == count_parameters(config).total
    assert registry.labels() == {"best": 1, "latest": 1}
    content = read_content(registry, version)
    model, tokenizer = content.model, content.tokenizer
    assert model.config == config and same_weights(model, read_model(folder, config))
    assert tokenizer.digest == read_tokenizer(folder, 257).digest == version.tokenizer_digest


def test_an_imported_version_has_the_losses_of_the_model_on_the_data(
    tmp_path: Path, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    folder = write_folder(tmp_path / "gpt2")
    version = imported(folder, data, directories).version
    held_out = np.frombuffer(Path(data.validation[0]).read_bytes().strip(), np.uint8)[: 64 * 16 + 1]
    windows = np.stack([held_out[start : start + 17] for start in range(0, 64 * 16, 16)])  # (N, T+1)
    tokens = mx.array(windows.astype(np.int32))
    expected = np.asarray(token_losses(read_model(folder, SHAPE), tokens[:, :-1], tokens[:, 1:])).mean(axis=1)  # (N,)
    assert version.validation_loss == pytest.approx(expected.mean(), abs=1e-5)
    # Each token is one byte.
    assert version.bits_per_byte == pytest.approx(version.validation_loss / np.log(2), abs=1e-6)
    assert version.claimed_loss == pytest.approx(expected[:16].mean(), abs=1e-5)
    np.testing.assert_array_equal(np.load(version_folder(registry, 1) / "evaluation.npy"), windows[:16])
    assert version.training_loss == pytest.approx(version.validation_loss, abs=0.2) and version.training_loss > 1


def test_the_state_of_an_imported_version_has_its_weights_and_moments_of_zero(
    tmp_path: Path, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    folder = write_folder(tmp_path / "gpt2")
    version = imported(folder, data, directories).version
    state = registry.verified_state(version.run, 0)
    position = json.loads((state / "position.json").read_text())
    assert (position["step"], position["tokens"]) == (0, 0)
    assert position["best_validation_loss"] == version.validation_loss
    assert position["config"] == version.training == TrainingConfig.from_dict(version.training).to_dict()
    # Two moments for each parameter; the other arrays are scalars.
    moments = [array for array in load_arrays(state / "optimizer.safetensors").values() if array.ndim > 0]
    assert len(moments) == 2 * len(parameters_of(GPT(SHAPE))) and not any(mx.any(each).item() for each in moments)
    weights = load_arrays(state / "model.safetensors")
    expected = parameters_of(read_model(folder, SHAPE))
    assert all(mx.array_equal(array, expected[name]) for name, array in weights.items())


def test_training_continues_an_imported_version(
    tmp_path: Path, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    before = imported(write_folder(tmp_path / "gpt2"), data, directories).version
    overrides = {"max_steps": "30", "warmup_steps": "2", "learning_rate": "0.01", "evaluation_interval": "30"}
    spec = TrainRequest(resume=1, overrides=overrides).resolve(registry)
    assert spec.data == data
    events: list[Event] = []
    assert TrainingRun(spec, Attempt(1, directories, Retention(), HERE, events.append, lambda: False)).train()
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (started.first_step, started.first_tokens) == (1, 0)
    (published,) = [event for event in events if isinstance(event, VersionPublished)]
    after = registry.version(published.version)
    assert (after.version, after.parent, after.step) == (2, 1, 30)
    # Both losses are on the same windows.
    assert after.evaluation_set == before.evaluation_set
    assert after.validation_loss < before.validation_loss - 0.5


def test_exporting_and_importing_a_version_keeps_its_bits(
    tmp_path: Path, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    first = imported(write_folder(tmp_path / "gpt2"), data, directories).version
    files = export_version(1, tmp_path / "new" / "folder", registry)
    names = ["config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]
    assert [path.name for path in files] == names
    assert files == [tmp_path / "new" / "folder" / name for name in names]
    second = imported(tmp_path / "new" / "folder", data, directories).version
    assert second.version == 2
    for name in ("model", "tokenizer_digest", "evaluation_set", "validation_loss", "bits_per_byte", "training"):
        assert getattr(first, name) == getattr(second, name)
    assert same_weights(read_content(registry, first).model, read_content(registry, second).model)
    assert files[2].read_bytes() == (tmp_path / "gpt2" / "model.safetensors").read_bytes()


def test_a_notice_reports_another_end_token_than_the_tokenizers(
    tmp_path: Path, data: DatasetSpec, directories: Directories
) -> None:
    folder = write_folder(tmp_path / "gpt2")
    assert not any("eos_token_id" in notice for notice in imported(folder, data, directories).notices)
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 98}
    (folder / "config.json").write_text(json.dumps(settings))
    assert imported(folder, data, directories).notices[-1] == (
        "eos_token_id is 98, but the tokenizer's last token, 256, ends a text."
    )


def test_a_rejected_folder_leaves_no_files(tmp_path: Path, data: DatasetSpec, directories: Directories) -> None:
    folder = write_folder(tmp_path / "gpt2")
    for name, kind in (("vocab.json", InvalidArgument), ("model.safetensors", CorruptCheckpoint)):
        spoilt = Path(shutil.copytree(folder, tmp_path / name))
        (spoilt / name).write_bytes((spoilt / name).read_bytes()[:50])
        with pytest.raises(kind):
            imported(spoilt, data, directories)
    with pytest.raises(NotFound, match="absent does not exist"):
        imported(tmp_path / "absent", data, directories)
    assert not directories.var.exists()


def test_a_notice_reports_that_rows_beyond_the_tokenizer_are_dropped(
    tmp_path: Path, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    for tied in (True, False):
        config = GPTConfig.from_dict(SHAPE.to_dict() | {"vocabulary_size": 320, "tied_head": tied})
        folder = write_folder(tmp_path / f"padded-{tied}", config)
        result = imported(folder, data, directories)
        assert result.notices[-1] == (
            "The model has 320 tokens, but the tokenizer has 257: the import drops the last 63 rows of the embedding, "
            "which no text uses."
        )
        model = read_content(registry, result.version).model
        assert model.config.vocabulary_size == 257
        whole = parameters_of(read_model(folder, config))
        for name, array in parameters_of(model).items():
            assert mx.array_equal(array, whole[name][:257] if whole[name].shape[0] == 320 else whole[name])


AWKWARD = pytest.mark.skipif("GPTLOOP_TEST_DATA" not in os.environ, reason="GPTLOOP_TEST_DATA is not set")


@AWKWARD
@pytest.mark.parametrize(
    ("name", "notice"),
    [
        ("padded", "The model has 320 tokens, but the tokenizer has 300: the import drops the last 20 rows"),
        ("sharded", ""),
        ("head_only", ""),
        (
            "pdrop",
            "config.json sets resid_pdrop 0.1, embd_pdrop 0.0, attn_pdrop 0.1; a run that continues this version",
        ),
    ],
)
def test_folders_of_other_programs_are_imported_and_continued(
    name: str, notice: str, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    result = imported(Path(os.environ["GPTLOOP_TEST_DATA"], "awkward", f"gpt2-{name}"), data, directories)
    notices = [each for each in result.notices if "held-out" not in each and "marker" not in each]
    assert len(notices) == (notice != "") and all(each.startswith(notice) and len(each) <= 300 for each in notices)
    assert read_content(registry, result.version).model.config.vocabulary_size == 300
    spec = TrainRequest(resume=1, overrides={"max_steps": "3"}).resolve(registry)
    assert spec.config.dropout == (0.1 if name == "pdrop" else 0.0)
    assert TrainingRun(spec, Attempt(1, directories, Retention(), HERE, lambda _: None, lambda: False)).train()


def test_a_model_whose_loss_is_not_finite_is_rejected(
    tmp_path: Path, data: DatasetSpec, directories: Directories, registry: Registry
) -> None:
    folder = write_folder(tmp_path / "gpt2", scale=1e30)
    with pytest.raises(InvalidArgument, match=r"has a loss of (nan|inf) on the held-out text"):
        imported(folder, data, directories)
    assert not root_of(registry).exists()


def test_a_vocabulary_too_large_for_training_is_rejected(
    tmp_path: Path, data: DatasetSpec, directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "gpt2")
    pieces = [bytes([value]) for value in range(256)] + [bytes([i // 256, i % 256]) for i in range(65536)]
    monkeypatch.setattr(interchange, "read_tokenizer", lambda *_: Tokenizer("bpe", PATTERN, pieces))
    settings = json.loads((folder / "config.json").read_text()) | {"vocab_size": len(pieces) + 1}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidArgument, match="vocabulary_size is 65793"):
        imported(folder, data, directories)


def test_an_export_never_writes_into_a_folder_that_is_not_empty(tmp_path: Path, registry: Registry) -> None:
    publish_tiny_version(registry, 1.0)
    target = tmp_path / "target"
    target.mkdir()
    export_version(1, target, registry)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    for taken in (target, target / "config.json"):
        with pytest.raises(AlreadyExists, match="exists and is not empty"):
            export_version(1, taken, registry)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_an_export_fills_an_empty_folder_without_replacing_it(tmp_path: Path, registry: Registry) -> None:
    publish_tiny_version(registry, 1.0)
    target = tmp_path / "target"
    (target / "lost+found").mkdir(parents=True)
    inode = target.stat().st_ino
    files = export_version(1, target, registry)
    assert target.stat().st_ino == inode
    assert {*files, target / "lost+found"} == set(target.iterdir())
    assert read_config(target).gpt == GPTConfig.from_dict(registry.version(1).model)


def test_an_export_can_fill_a_mounted_folder(tmp_path: Path, registry: Registry) -> None:
    publish_tiny_version(registry, 1.0)
    target = tmp_path / "target"
    target.mkdir()
    mounted = ["unshare", "--mount", "--map-root-user", "sh", "-ec", 'mount -t tmpfs none "$0"; exec "$@"', str(target)]
    if sys.platform != "linux" or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("This system does not let a user mount a file system.")
    code = (
        "import sys; from pathlib import Path; from tests.registries import disk_registry; "
        "from trainer_service.huggingface.interchange import export_version; "
        "files = export_version(1, Path(sys.argv[1]), disk_registry(Path(sys.argv[2]))); "
        "assert set(files) == set(Path(sys.argv[1]).iterdir()) and Path(sys.argv[1]).is_mount(); print(len(files))"
    )
    command = [*mounted, sys.executable, "-c", code, str(target), str(root_of(registry))]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "5\n"), ended.stderr
    assert list(target.iterdir()) == []  # the mount is gone with its process


def test_an_export_that_fails_midway_removes_its_files(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny_version(registry, 1.0)
    target = tmp_path / "target"
    target.mkdir()
    moved: list[str] = []

    def rename(path: Path, to: Path) -> None:
        if path.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        moved.append(path.name)
        path.replace(to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(FailedPrecondition, match="target cannot be written: Input/output error"):
            export_version(1, target, registry)
    assert len(moved) == 4 and list(target.iterdir()) == []


def test_a_missing_or_damaged_version_is_not_exported(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(NotFound, match="There is no version 1"):
        export_version(1, tmp_path / "target", registry)
    publish_tiny_version(registry, 1.0)
    (version_folder(registry, 1) / "evaluation.npy").write_bytes(b"other")
    with pytest.raises(CorruptCheckpoint):
        export_version(1, tmp_path / "target", registry)
    assert not (tmp_path / "target").exists()


def test_a_failed_export_leaves_no_files(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_tiny_version(registry, 1.0)
    folder = tmp_path / "folder"
    folder.mkdir()

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[write] Unable to write 100 bytes to file.")

    def reject(_tokenizer: object, _context_length: int, directory: Path) -> None:
        assert (directory / "model.safetensors").exists()
        raise InvalidArgument("Not this tokenizer.")

    monkeypatch.setattr(interchange, "write_tokenizer", reject)
    with pytest.raises(InvalidArgument):
        export_version(1, folder / "target", registry)
    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(FailedPrecondition, match="target cannot be written: Input/output error"):
        export_version(1, folder / "target", registry)
    assert list(folder.iterdir()) == []


def test_the_commands_print_their_results(tmp_path: Path, data: DatasetSpec) -> None:
    folder = write_folder(tmp_path / "gpt2")
    environment = os.environ | {"GPTLOOP_VAR": str(tmp_path / "var"), "PYTHONPATH": str(PROJECT)}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "trainer_service", *arguments], env=environment, capture_output=True, text=True
        )

    files = [f"--dataset={name}" for name in data.dataset] + [f"--validation={name}" for name in data.validation]
    ended = call("import", str(folder), *files)
    assert ended.returncode == 0, ended.stderr
    assert "measuring the loss" in ended.stderr
    version = disk_registry(tmp_path / "var" / "registry").version(1)
    for line in (
        "version     1",
        f"parameters  {version.parameters:,}",
        f"held out    {version.validation_loss:.4f} nats per token, {version.bits_per_byte:.4f} bits per byte",
        "labels      best, latest",
        'Continue it with `gptloop train --resume 1 --set "max_steps=500"`.',
    ):
        assert line in ended.stdout.splitlines()
    exported = call("export", "1", str(tmp_path / "out"))
    assert exported.returncode == 0, exported.stderr
    assert [line.split()[-1] for line in exported.stdout.splitlines()] == [
        str(path) for path in sorted((tmp_path / "out").iterdir())
    ]
    again = call("export", "1", str(tmp_path / "out"))
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'out'} exists and is not empty; name a new or an empty folder.\n"
