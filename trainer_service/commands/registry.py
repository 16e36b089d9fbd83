"""Commands that list the registry, bring versions in and out, check and prune it, and show the use of disk space."""

import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared.device import accelerator
from shared.errors import CorruptCheckpoint, NewerFormat, NotFound, Unavailable
from shared.registry import retention as retention_module
from shared.registry.policy import labels_of
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Verdict, judge
from shared.service import cli
from shared.service.lists import Column, JsonOption, print_list
from shared.service.live_bar import LiveBar
from shared.service.settings import read_best_by, read_directories
from shared.text import format_size, printable
from trainer_service import dataset_names, listings
from trainer_service.commands.options import DatasetOption, ValidationOption, settings, version_number
from trainer_service.disk import Usage, usage
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import DEFAULT_DATASET
from trainer_service.jobs.submit import release_ended
from trainer_service.redis_client import connect, read_redis
from trainer_service.settings import read_retention
from trainer_service.text.corpus import DatasetSpec, check_spec

app = cli.new_app(None)


@app.command()
def checkpoints(as_json: JsonOption = False) -> None:
    """List the versions in the registry, the oldest first.

    Example: gptloop checkpoints
    """
    listings.print_checkpoints(settings().open_registry(), as_json)


@app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder.")],
    dataset: DatasetOption = None,
    validation: ValidationOption = None,
) -> None:
    """Make a version of a GPT-2 folder in Hugging Face's layout.

    The folder holds config.json, model.safetensors, vocab.json and merges.txt. The held-out loss is measured on a data
    set, as for every version, so that versions can be compared.

    \b
    Examples:
      gptloop import gpt2
      gptloop import my-gpt2 --dataset stories.txt --validation held-out.txt
    """
    given = settings()
    spec = DatasetSpec(dataset_names.expand(dataset or (DEFAULT_DATASET,)), dataset_names.expand(validation or ()))
    check_spec(spec)
    device = accelerator.prepare(given.directories.cache / "trainer")
    # Brings MLX in, so not before the accelerator is prepared.
    from trainer_service.huggingface.interchange import import_folder
    from trainer_service.training.workers import Workers

    with Workers(device.threads) as workers, cli.Stages() as stages:
        imported = import_folder(directory, spec, given, workers, stages.show)
    for notice in imported.notices:
        print(f"note: {notice}")
    version = imported.version
    labels = given.open_registry().labels()
    print(f"version     {version.version}")
    print(f"parameters  {version.parameters:,}")
    print(f"training    {version.training_loss:.4f} nats per token, on one batch")
    print(f"held out    {version.validation_loss:.4f} nats per token, {version.bits_per_byte:.4f} bits per byte")
    print("labels      " + (", ".join(labels_of(version.version, labels)) or "none"))
    print(f'Continue it with `gptloop train --resume {version.version} --set "max_steps=500"`.')


@app.command()
def export(
    version: Annotated[str, typer.Argument(help="A number, as `gptloop checkpoints` lists it, best or latest.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty folder.")],
) -> None:
    """Write a version as a GPT-2 folder in Hugging Face's layout.

    transformers and other libraries load such a folder.

    Example: gptloop export 3 my-gpt2
    """
    given = settings()
    accelerator.prepare(given.directories.cache / "trainer")
    # Brings MLX in, so not before the accelerator is prepared.
    from trainer_service.huggingface.interchange import export_version

    registry = given.open_registry()
    for path in export_version(version_number(version, registry), directory, registry):
        print(f"{path.stat().st_size:>13,} bytes  {path}")


@app.command()
def verify() -> None:
    """Compare every file of every version and state, and of the teachers of runs, with its hash.

    Reads the whole registry and changes nothing. The exit code is 1 if something is broken.

    Example: gptloop verify
    """
    registry = read_directories(os.environ).open_registry()
    checkpoints = registry.checkpoints()
    broken = [
        (place.rpartition("/")[2], "The registry gives no such name: nothing reads it.", place)
        for place in registry.store.unknown()
    ]
    for checkpoint, reason in _check(registry, checkpoints):
        broken.append((str(checkpoint), reason, registry.place(checkpoint)))
    for run in registry.teachers.runs():
        try:
            registry.teachers.verify(run)
        except CorruptCheckpoint as error:
            broken.append((f"teachers of {run}", str(error), registry.teachers.place(run)))
    if not broken:
        print(f"Whole: {_count(checkpoints)}.")
        return
    columns = (
        Column[tuple[str, str, str]]("broken", lambda each: each[0]),
        Column[tuple[str, str, str]]("reason", lambda each: each[1], wraps=True),
    )
    print_list(broken, columns)
    print(
        f"{len(broken)} broken, looked at {_count(checkpoints)}. Broken versions and states are never served and never "
        "continued: others take their place. Restore the files from a copy, or remove the folder:"
    )
    for _, _, place in broken:
        print(f"  {printable(place)}")
    raise typer.Exit(1)


@app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go and remove nothing.")] = False,
    states: Annotated[int | None, typer.Option(help="Last states of each run; GPTLOOP_KEEP_STATES.")] = None,
    best: Annotated[int | None, typer.Option(help="Best of each evaluation set; GPTLOOP_KEEP_BEST.")] = None,
    newest: Annotated[int | None, typer.Option(help="Newest versions; GPTLOOP_KEEP_NEWEST.")] = None,
    every: Annotated[int | None, typer.Option(help="Multiples of this number, 0: none; GPTLOOP_KEEP_EVERY.")] = None,
    runs: Annotated[int | None, typer.Option(help="Runs that wrote a state last; GPTLOOP_KEEP_RUNS.")] = None,
) -> None:
    """Remove the versions and states that no rule keeps.

    Training does the same after each version. A version stays if a label names it or a job needs it, together with the
    state that continues it. The last states of an unfinished run stay if one of them was written within a week. A
    serving version continues to serve from memory. An option that you leave out takes the value of its variable.

    \b
    Examples:
      gptloop prune --dry-run
      gptloop prune --newest 3 --best 1
    """
    directories = read_directories(os.environ)
    registry = directories.open_registry(read_best_by(os.environ))
    if registry.holds.ages_s():
        with suppress(Unavailable):  # then held versions stay
            queue = JobQueue(connect(read_redis(os.environ, directories)), registry.store.id())
            release_ended(queue, registry)
    given = {"states": states, "best": best, "newest": newest, "every": every, "runs": runs}
    values = {name: value for name, value in given.items() if value is not None}
    retention = replace(read_retention(os.environ), **values)
    verdicts = judge(registry, retention)
    if not verdicts:
        print("Nothing to prune: the registry holds no version and no state.")
        return
    sizes = {verdict.checkpoint: registry.size_bytes(verdict.checkpoint) for verdict in verdicts}
    gone_by_now = "would go" if dry_run else "goes"
    columns = (
        Column[Verdict]("checkpoint", lambda each: str(each.checkpoint)),
        Column[Verdict]("size", lambda each: format_size(sizes[each.checkpoint]), rank=1, right=True),
        Column[Verdict]("outcome", lambda each: "stays" if each.reasons else gone_by_now),
        Column[Verdict]("why", _why, wraps=True),
    )
    print_list(verdicts, columns)
    gone = [verdict.checkpoint for verdict in verdicts if not verdict.reasons]
    if not dry_run:
        gone = retention_module.prune(registry, retention)
    verb = "would be removed" if dry_run else "removed"
    print(f"{_count(gone)} {verb}: {format_size(sum(sizes[each] for each in gone))}.")
    over = sum(sizes.values()) - sum(sizes[each] for each in gone) - retention.size_bytes
    if retention.size_bytes and over > 0:
        print(f"What stays is {format_size(over)} larger than GPTLOOP_KEEP_BYTES, and nothing of it can go.")


@app.command()
def disk(as_json: JsonOption = False) -> None:
    """Show how much disk space each kind of file takes.

    The list covers the folder that GPTLOOP_VAR names, and says how to free space.

    Example: gptloop disk
    """
    found = usage(read_directories(os.environ))
    columns = (
        Column[Usage]("what", lambda each: each.kind),
        Column[Usage](
            "size",
            lambda each: each.size_bytes,
            lambda each: format_size(each.size_bytes),
            key="size_bytes",
            right=True,
        ),
        Column[Usage]("where", lambda each: str(each.path), rank=1),
        Column[Usage]("how it gets less", lambda each: each.advice, rank=2, wraps=True),
    )
    print_list(found, columns, as_json=as_json)
    if not as_json:
        print(f"All of it: {format_size(sum(each.size_bytes for each in found))}.")


def _check(registry: Registry, checkpoints: list[Checkpoint]) -> list[tuple[Checkpoint, str]]:
    """Returns what is broken and why; shows its progress."""
    broken = []
    sizes = [registry.size_bytes(checkpoint) for checkpoint in checkpoints]
    total, done = sum(sizes), 0
    bar = LiveBar(Console(stderr=True))
    with bar if sys.stderr.isatty() else nullcontext():
        for checkpoint, size_bytes in zip(checkpoints, sizes, strict=True):
            bar.show(done / max(total, 1), str(checkpoint), f"{format_size(done)} of {format_size(total)}")
            try:
                registry.check(checkpoint)
            except NotFound:
                # It has just been removed.
                pass
            except (CorruptCheckpoint, NewerFormat) as error:
                broken.append((checkpoint, str(error)))
            done += size_bytes
    return broken


def _why(verdict: Verdict) -> str:
    if verdict.has_no_room:
        return "GPTLOOP_KEEP_BYTES leaves it no room"
    return ", ".join(verdict.reasons) or "nothing keeps it"


def _count(checkpoints: list[Checkpoint]) -> str:
    versions = sum(checkpoint.run is None for checkpoint in checkpoints)
    states = len(checkpoints) - versions
    return f"{versions} version{'s' * (versions != 1)} and {states} state{'s' * (states != 1)}"
