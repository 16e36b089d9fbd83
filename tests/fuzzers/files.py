"""Odd files, read by commands and as the services read them."""

import contextlib
import io
import json
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

from inference_service.versions.gate import Refused, read_content
from shared.errors import GptloopError
from shared.registry.registry import Registry
from shared.service import cli
from shared.service.access.tokens import TokenFile
from tests.fakes import publish_tiny_version
from tests.fuzzers.area import Area
from tests.fuzzers.registry import choose, files_of, kind_of
from tests.jobs import training
from tests.mutations import json_bytes, odd_bytes, odd_file
from tests.registries import disk_registry, registry_id, root_of, version_folder

COMMANDS = (
    *("checkpoints", "runs", "disk", "verify", "prune --dry-run", "history taught", "history taught --csv"),
    *("runs --json", "checkpoints --json", "history taught --json", "export 1 --dir exported"),
)


def _identify(root: Path) -> None:
    registry_id(root)


def _raise_fence(root: Path) -> None:
    disk_registry(root).take_over("taught")


def _read_teachers(root: Path) -> None:
    teachers = disk_registry(root).teachers
    for run in teachers.runs():
        teachers.verify(run)


# What reads files that no command of the list reads.
_READERS: dict[str, Callable[[Path], object]] = {
    "identity": _identify,
    "fences": _raise_fence,
    "numbering": lambda root: publish_tiny_version(disk_registry(root), 1.0),
    "teachers.json": _read_teachers,
    "holds": lambda root: (disk_registry(root).holds.jobs(), disk_registry(root).holds.runs()),
    "findings": lambda root: disk_registry(root).decisions.findings(),
}


def try_registry(rng: random.Random, area: Area, var: Path) -> None:
    """Changes a file of the registry, and runs in this process a command, or what else reads it."""
    from deploy.commands import app

    root = var / "registry"
    kind, path = choose(rng, root)
    before = path.read_bytes()
    after = odd_file(rng, before)
    path.write_bytes(after)
    command = rng.choice(COMMANDS)
    area.tried(kind)
    exported = var / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    try:
        if kind in _READERS and rng.random() < 0.7:
            command = kind
            _READERS[kind](root)
        else:
            arguments = command.replace("exported", str(exported)).split()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                cli.invoke(app, arguments)
    except (GptloopError, OSError, SystemExit):
        pass
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        area.fell(
            f"{command}: {type(error).__name__} {where.filename.rpartition('/')[2]}:{where.lineno}", (path.name, after)
        )
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        path.write_bytes(before)


def seal(registry: Registry, number: int) -> None:
    """Writes the hashes of changed files into the manifest, so that the readers of the files meet them."""
    import hashlib

    folder = version_folder(registry, number)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for record in manifest["files"]:
        content = (folder / record["name"]).read_bytes()
        record["sha256"], record["size"] = hashlib.sha256(content).hexdigest(), len(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def try_version(rng: random.Random, area: Area, var: Path) -> None:
    """Changes a file of a version, corrects its hash, and reads the version as the server does."""
    registry = disk_registry(var / "registry")
    folder = version_folder(registry, 1)
    kept = {path: path.read_bytes() for path in files_of(folder)}
    path = rng.choice(list(kept))
    before = kept[path]
    header = int.from_bytes(before[:8], "little") if path.suffix == ".safetensors" else 0
    kind = kind_of(path, root_of(registry))
    if header and rng.random() < 0.7:
        kind = "safetensors headers"
        changed = odd_file(rng, before[8 : 8 + header])
        after = len(changed).to_bytes(8, "little") + changed + before[8 + header :]
    else:
        after = odd_file(rng, before)
    area.tried(kind)
    try:
        path.write_bytes(after)
        if path.name != "manifest.json":
            seal(registry, 1)
        fresh = disk_registry(var / "registry")
        for manifest in fresh.versions():
            if manifest.version == 1:
                read_content(fresh, manifest)
    except (GptloopError, Refused):
        pass
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        area.fell(
            f"{path.name}: {type(error).__name__} {error} {where.filename.rpartition('/')[2]}:{where.lineno}"[:200],
            after,
        )
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        for each, content in kept.items():
            each.write_bytes(content)


def try_tokens(rng: random.Random, area: Area, var: Path) -> None:
    """Reads a file of tokens that was changed."""
    path = var / "tokens"
    path.write_bytes(odd_bytes(rng, b"# people\nalice 0123456789abcdef\nbob fedcba9876543210\n"))
    area.tried()
    try:
        TokenFile("GPTLOOP_CLIENT_TOKENS", path).name_of(b"x" * 32)
    except GptloopError:
        pass
    except Exception as error:
        area.fell(f"tokens: {error!r}", path.read_bytes())


def try_ledger(rng: random.Random, area: Area, var: Path) -> None:
    """Reads the ledger of a teacher's stories that was changed."""
    from trainer_service.distillation import ledger

    folder = var / "stories"
    folder.mkdir(exist_ok=True)
    row = {"state": "sent", "key": "k" * 64, "cost_usd": "0.001", "prompt": {"words": ["a"]}, "sample": 1, "at": 1.0}
    answered = {
        "state": "answered",
        "key": "k" * 64,
        "cost_usd": "0.001",
        "text": "A story.",
        "finish": "stop",
        "sample": 1,
    }
    (folder / "ledger.jsonl").write_bytes(odd_file(rng, json_bytes(row) + b"\n" + json_bytes(answered) + b"\n"))
    area.tried()
    try:
        ledger.read_account(folder)
        ledger.last_rows(folder)
        ledger.read_stories(folder)
    except GptloopError:
        pass
    except Exception as error:
        area.fell(f"ledger: {error!r}", (folder / "ledger.jsonl").read_bytes())


def try_text(rng: random.Random, area: Area, var: Path) -> None:
    """Prepares a text that was changed for training."""
    from trainer_service.text.corpus import DatasetSpec
    from trainer_service.text.tokens import prepare

    path = var / rng.choice(("text.txt", "text.jsonl", "text.parquet", "text.json", "text.csv", "text.gz"))
    plain = "<|endoftext|>".join(f"Tale {n} of the {n * n} foxes." for n in range(300)).encode()
    lines = b"\n".join(json_bytes({"text": f"Tale {n} of the {n * n} foxes."}) for n in range(300))
    path.write_bytes(odd_file(rng, lines if path.suffix == ".jsonl" else plain))
    from tests.trainer_service.site import Site  # noqa: F401

    config = training(var, tokenizer="bpe", vocabulary_size="300", context_length="16", evaluation_windows="2").config
    area.tried()
    try:
        prepare(DatasetSpec((str(path),)), config, var / "data", lambda *_: None, None, stories=None)
    except (GptloopError, OSError):
        pass
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        area.fell(
            f"{path.suffix}: {type(error).__name__} {where.filename.rpartition('/')[2]}:{where.lineno}",
            path.read_bytes(),
        )
    finally:
        path.unlink()
        shutil.rmtree(var / "data", ignore_errors=True)
