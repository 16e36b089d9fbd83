"""A registry that has a file of each kind, and the kinds of its files."""

import random
import re
import time
from pathlib import Path

from shared.registry.findings import Finding
from shared.registry.history import EvaluationLine, ReportLine
from shared.registry.registry import Registry
from tests.fakes import publish_tiny_version
from tests.records import write_record
from tests.registries import disk_registry, root_of, version_folder

# What the path of a file in the registry is, by its beginning and end.
KINDS = {
    "policy": r"serving/policy",
    "stable version": r"serving/stable",
    "findings": r"serving/findings/.*",
    "holds": r"holds/.*",
    "fences": r"runs/[^/]+/fence",
    "identity": r"id",
    "numbering": r"last_version",
    "evaluation records": r"evaluations/.*\.json",
    "histories": r"runs/[^/]+/history\.jsonl",
    "teachers.json": r"runs/[^/]+/teachers\.json",
    "manifests": r".*/manifest\.json",
    "safetensors": r".*\.safetensors",
    "tokenizers": r".*/tokenizer\.json",
    "configurations": r".*/config\.json",
    "held-out windows": r".*\.npy",
}


def registry_of(folder: Path) -> Registry:
    """Makes a registry that has a file of each kind."""
    registry = disk_registry(folder / "registry")
    for number in range(1, 4):
        version = publish_tiny_version(registry, 1.0 / number)
        write_record(registry, version, 1.0)
        registry.decisions.keep(number, Finding(version.digest, "none", version.claimed_loss, None, "", 1.0))
    registry.decisions.set_policy("best")
    registry.decisions.set_stable(1)
    registry.holds.add("job", 1, "run:tiny")
    fence = registry.take_over("taught")
    registry.teachers.take(fence, version_folder(registry, 1))
    registry.teachers.keep(fence, [1])
    model = (version_folder(registry, 1) / "model.safetensors").read_bytes()

    def write(state: Path) -> None:
        (state / "model.safetensors").write_bytes(model)

    registry.write_state(fence, 1, write)
    report = ReportLine(1, 10, 2.0, 0.1, 1.0, 10.0, 1, 1, 1, time.time(), 1)
    registry.histories.writer(fence, 0).append(
        report, EvaluationLine(1, 10, 2.0, 1.0, None, time.time(), 1), synced=True
    )
    (root_of(registry) / "id").write_text("0123456789abcdef")
    return registry


def files_of(folder: Path) -> list[Path]:
    """Returns the files of a folder, those that are no locks."""
    return [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock" and path.name != "lock"
    ]


def kind_of(path: Path, root: Path) -> str:
    """Returns what kind of file a file of the registry is."""
    name = path.relative_to(root).as_posix()
    (first, *_) = [kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)]
    return first


def choose(rng: random.Random, root: Path) -> tuple[str, Path]:
    """Chooses a kind of file, each as often as the others, and a file of this kind."""
    kind = rng.choice(list(KINDS))
    return kind, rng.choice([path for path in files_of(root) if kind_of(path, root) == kind])
