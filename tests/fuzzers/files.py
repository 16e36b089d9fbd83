"""Odd files, read by commands and as the services read them."""

import contextlib
import io
import json
import random
import shutil
import traceback
from pathlib import Path

from inference_service.versions.gate import Refused, read_content
from shared.errors import GptloopError
from shared.registry.store import Registry
from shared.service import cli
from shared.service.access.tokens import TokenFile
from tests.fakes import publish_tiny_version
from tests.fuzzers.area import Area
from tests.jobs import training
from tests.mutations import json_bytes, odd_bytes, odd_file
from tests.records import write_record

COMMANDS = (
    *("checkpoints", "runs", "disk", "verify", "prune --dry-run", "history tiny", "history tiny --csv", "runs --json"),
    *("checkpoints --json", "history tiny --json", "export 1 --dir exported"),
)


def registry_of(folder: Path) -> Registry:
    """Makes a registry that has a file of each kind."""
    registry = Registry(folder / "registry")
    for number in range(3):
        publish_tiny_version(registry, 1.0 / (number + 1), better_by=0.0)
        write_record(registry, registry.version(number + 1), 1.0)
    registry.decisions.set_policy("best")
    registry.decisions.set_stable(1)
    return registry


def files_of(folder: Path) -> list[Path]:
    """Returns the files of a folder, those that are no locks."""
    return [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock" and path.name != "lock"
    ]


def try_commands(rng: random.Random, area: Area, var: Path) -> None:
    """Changes a file of the registry, and runs a command that reads it, in this process."""
    from deploy.commands import app

    path = rng.choice(files_of(var / "registry"))
    before = path.read_bytes()
    after = odd_file(rng, before)
    path.write_bytes(after)
    command = rng.choice(COMMANDS)
    area.inputs += 1
    exported = var / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    try:
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

    folder = registry.version_directory(number)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for record in manifest["files"]:
        content = (folder / record["name"]).read_bytes()
        record["sha256"], record["size"] = hashlib.sha256(content).hexdigest(), len(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def try_version(rng: random.Random, area: Area, var: Path) -> None:
    """Changes a file of a version, corrects its hash, and reads the version as the server does."""
    registry = Registry(var / "registry")
    folder = registry.version_directory(1)
    kept = {path: path.read_bytes() for path in files_of(folder)}
    path = rng.choice([each for each in kept if each.name != "manifest.json"] + [folder / "manifest.json"])
    before = kept[path]
    header = int.from_bytes(before[:8], "little") if path.suffix == ".safetensors" else 0
    if header and rng.random() < 0.7:
        changed = odd_file(rng, before[8 : 8 + header])
        after = len(changed).to_bytes(8, "little") + changed + before[8 + header :]
    else:
        after = odd_file(rng, before)
    area.inputs += 1
    try:
        path.write_bytes(after)
        if path.name != "manifest.json":
            seal(registry, 1)
        fresh = Registry(var / "registry")
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
    area.inputs += 1
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
    area.inputs += 1
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
    area.inputs += 1
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
