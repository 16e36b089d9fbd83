"""The trainer's commands: queue jobs, follow them, run the processes of the service."""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import interrupts

    interrupts.end_quietly()

import asyncio
import os
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared.device import accelerator
from shared.errors import InvalidArgument, Unavailable, shown
from shared.registry.identity import registry_id
from shared.registry.policy import labels_of
from shared.registry.store import Registry
from shared.service import cli, logs
from shared.service.lists import JsonOption
from trainer_service import dataset_names, listings, registry_commands
from trainer_service.follow import follow
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import (
    DEFAULT_DATASET,
    DEFAULT_PRESET,
    EvaluateRequest,
    JobRequest,
    PrepareRequest,
    TrainRequest,
    parse_overrides,
)
from trainer_service.jobs.specs import Kind, TrainSpec
from trainer_service.jobs.submit import submit
from trainer_service.plan import Machine, Plan
from trainer_service.presets import PRESETS, find_preset
from trainer_service.redis_server import connect, run
from trainer_service.runs import all_runs, chosen
from trainer_service.settings import TrainerSettings, read_settings
from trainer_service.text.corpus import DatasetSpec, check_spec

app = cli.new_app(__doc__)
app.add_typer(registry_commands.app)

PresetOption = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; default {DEFAULT_PRESET}.")]
_DATASETS = (
    "builtin, roneneldan/TinyStories, wikitext-103; or text files, folders and patterns. Put quotes around a name with "
    "spaces. Repeatable. Default: "
)
DatasetOption = Annotated[list[str] | None, typer.Option("--dataset", help=f"{_DATASETS}builtin.")]
ValidationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--validation",
        help="Held-out files, given in the same way. Default: the data set's own split or a share of it. Repeatable.",
    ),
]
OverridesOption = Annotated[
    str, typer.Option("--set", help='Values that override the preset, as in "max_steps=500 batch_size=8".')
]
AfterOption = Annotated[
    list[str] | None, typer.Option("--after", help="Jobs that must finish first. Repeatable.", metavar="JOB")
]
JobArgument = Annotated[str, typer.Argument(help="The id of the job, as `gptloop jobs` lists it.")]
FollowOption = Annotated[bool, typer.Option("--follow/--no-follow", help="Follow the job until it ends.")]


# A plan takes the speed and the size of text from the newest jobs.
_JOBS_TO_LEARN_FROM = 200
# Versions have numbers of 64 bits.
_LONGEST_NUMBER = 18


@app.command()
def train(
    preset: PresetOption = "",
    dataset: DatasetOption = None,
    validation: ValidationOption = None,
    resume: Annotated[
        str, typer.Option(help="The version to continue, with its text and values: a number, or a label such as best.")
    ] = "",
    overrides: OverridesOption = "",
    only_prepare: Annotated[
        bool, typer.Option("--only-prepare", help="Prepare the tokens of the run and do not train.")
    ] = False,
    name: Annotated[str, typer.Option(help="The name of the run. Default: a new one.")] = "",
    notes: Annotated[str, typer.Option(help="A note on the run, which `gptloop runs` shows.")] = "",
    after: AfterOption = None,
    wait: FollowOption = True,
) -> None:
    """Queue a training job and follow it.

    \b
    Examples:
      gptloop train --preset small --dataset stories.txt --set "max_steps=500 batch_size=8"
      gptloop train --resume 3 --set "max_steps=1200"

    \b
    Three jobs, each of which waits for the one before it:
      gptloop train --only-prepare --no-follow
      gptloop train --after PREPARE_JOB --no-follow
      gptloop eval --after TRAIN_JOB
    """
    request = TrainRequest(
        preset=preset,
        dataset=dataset_names.expand(dataset or ()),
        validation=dataset_names.expand(validation or ()),
        resume=_version(resume) if resume else None,
        overrides=parse_overrides(overrides),
        name=name,
        notes=notes,
        after=_jobs(after),
    )
    _submit(_preparation(request) if only_prepare else request, wait)


@app.command()
def evaluate(
    version: Annotated[
        str, typer.Argument(help="A number, best or latest; a label is resolved when the job starts.")
    ] = "best",
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help=f"{_DATASETS}the text that the version was trained with.")
    ] = None,
    validation: ValidationOption = None,
    after: AfterOption = None,
    wait: FollowOption = True,
) -> None:
    """Queue a job that measures the held-out loss of a version.

    The job reads up to 1000 windows of the held-out part of the data set. With --validation it reads only those files.

    \b
    Examples:
      gptloop eval
      gptloop eval 3 --dataset stories.txt
      gptloop eval 3 --validation letters.txt
    """
    request = EvaluateRequest(
        version=version,
        dataset=dataset_names.expand(dataset or ()),
        validation=dataset_names.expand(validation or ()),
        after=_jobs(after),
    )
    _submit(request, wait)


def _preparation(request: TrainRequest) -> PrepareRequest:
    if request.name or request.notes:
        raise InvalidArgument("--name and --notes describe a run, but --only-prepare trains none; leave them out.")
    values = {name: value for name, value in vars(request).items() if name not in ("name", "notes")}
    return PrepareRequest(**values)


def _submit(request: JobRequest, wait: bool) -> None:
    settings = _settings()
    queue = _queue(settings)
    registry = Registry(settings.directories.registry)
    spec, plan = request.resolve(registry), []
    if isinstance(spec, TrainSpec):
        earlier = islice(queue.store.jobs(), _JOBS_TO_LEARN_FROM)
        plan = Plan.of(spec, registry, earlier, Machine.here()).lines()
    record = submit(spec, queue, registry, request.after)
    print(f"job {record.id} queued: {spec.kind.value} {spec.run}", *plan, sep="\n", flush=True)
    if not queue.store.live_workers():
        raise Unavailable(
            f"No worker is running. Start one with `gptloop up`; the job {record.id} stays queued until then."
        )
    if wait:
        _follow(queue, record.id)


@app.command()
def watch(job: JobArgument) -> None:
    """Follow a job from its first event until it ends.

    Example: gptloop watch 3f2a91c4
    """
    queue = _queue(_settings())
    queue.store.get(job)
    _follow(queue, job)


@app.command()
def cancel(job: JobArgument) -> None:
    """Ask a job to end.

    A running job finishes its step and keeps its state.

    Example: gptloop cancel 3f2a91c4
    """
    record = _queue(_settings()).cancel(job)
    print(f"job {job} is {record.state.value}")


@app.command()
def jobs(as_json: JsonOption = False) -> None:
    """List the jobs, the newest first.

    \b
    Examples:
      gptloop jobs
      gptloop jobs --json
    """
    listings.print_jobs(list(_queue(_settings()).store.jobs()), as_json)


@app.command()
def runs(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these runs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs and the values in which they differ.

    \b
    Examples:
      gptloop runs
      gptloop runs wide narrow --json
    """
    settings = _settings()
    found = all_runs(_queue(settings).store.jobs(kinds=[Kind.TRAIN]), Registry(settings.directories.registry))
    listings.print_runs(chosen(found, " ".join(names or ()).split()), as_json)


@app.command()
def checkpoints(as_json: JsonOption = False) -> None:
    """List the versions in the registry, the oldest first.

    Example: gptloop checkpoints
    """
    listings.print_checkpoints(Registry(_settings().directories.registry), as_json)


@app.command()
def data(
    preset: PresetOption = DEFAULT_PRESET,
    dataset: DatasetOption = None,
    validation: ValidationOption = None,
    overrides: OverridesOption = "",
) -> None:
    """Prepare a data set and show a sample of it.

    Trains a tokenizer if there is none yet, writes the tokens and counts them.

    \b
    Examples:
      gptloop prepare
      gptloop prepare --preset small --dataset stories.txt
    """
    from trainer_service.text import tokens

    config = find_preset(preset).override(parse_overrides(overrides))
    spec = DatasetSpec(dataset_names.expand(dataset or (DEFAULT_DATASET,)), dataset_names.expand(validation or ()))
    check_spec(spec)
    with cli.Stages() as stages:
        prepared = tokens.prepare(spec, config, _settings().directories.data, stages.show)
    for notice in prepared.notices:
        print(f"note: {notice}")
    epochs = config.max_steps * config.tokens_per_step / prepared.train.size
    print(f"source      {prepared.source} ({prepared.revision[:12]})")
    print(f"tokenizer   {prepared.tokenizer.name}, {prepared.tokenizer.vocabulary_size:,} tokens")
    print(f"training    {prepared.train.size:,} tokens, read {epochs:,.2f} times in {config.max_steps:,} steps")
    print(f"held out    {prepared.validation.size:,} tokens")
    print("sample      " + prepared.tokenizer.decode(prepared.train[:80].tolist()).replace("\n", " ") + " …")


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
    settings = _settings()
    spec = DatasetSpec(dataset_names.expand(dataset or (DEFAULT_DATASET,)), dataset_names.expand(validation or ()))
    check_spec(spec)
    device = accelerator.prepare(settings.directories.cache / "trainer", own_threads=True)
    # Only now, as MLX must load after its fast BLAS.
    from trainer_service.huggingface.interchange import import_folder
    from trainer_service.training.workers import Workers

    with Workers(device.threads) as workers, cli.Stages() as stages:
        imported = import_folder(directory, spec, settings.directories, settings.retention, workers, stages.show)
    for notice in imported.notices:
        print(f"note: {notice}")
    version = imported.version
    labels = Registry(settings.directories.registry).labels()
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
    settings = _settings()
    accelerator.prepare(settings.directories.cache / "trainer")
    # Only now, as MLX must load after its fast BLAS.
    from trainer_service.huggingface.interchange import export_version

    for path in export_version(_version(version), directory, Registry(settings.directories.registry)):
        print(f"{path.stat().st_size:>13,} bytes  {path}")


@app.command()
def serve() -> None:
    """Run the trainer's API: gRPC TrainingService and the metrics page."""
    from trainer_service import server

    logs.configure("trainer")
    asyncio.run(server.serve(_settings()))


@app.command()
def work() -> None:
    """Run a worker: takes jobs from the queue, one at a time."""
    from trainer_service.jobs import worker

    logs.configure("worker")
    worker.work(_settings())


@app.command()
def redis() -> None:
    """Run the embedded Redis below GPTLOOP_VAR, in the foreground."""
    run(_settings().directories)


def _settings() -> TrainerSettings:
    return read_settings(os.environ)


def _version(text: str) -> int:
    """Returns the number of a version that a number or a label names; raises `NotFound` if it does not exist."""
    registry = Registry(_settings().directories.registry)
    if text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER:
        return registry.version(int(text)).version
    try:
        return registry.resolve(text).version
    except InvalidArgument:
        raise InvalidArgument(
            f"The version is {shown(text)}, but must be a number or a label, such as best, latest or run:<name>."
        ) from None


def _jobs(values: list[str] | None) -> tuple[str, ...]:
    """Returns the ids in some values, each of which may hold several."""
    return tuple(job for value in values or () for job in value.split())


def _queue(settings: TrainerSettings) -> JobQueue:
    return JobQueue(connect(settings.redis_url), registry_id(settings.directories.registry))


def _follow(queue: JobQueue, job: str) -> None:
    try:
        follow(queue, job, Console())
    except KeyboardInterrupt:
        print(f"The job goes on. Follow it again with `gptloop watch {job}`, end it with `gptloop cancel {job}`.")
        raise typer.Exit(130) from None
    if queue.store.get(job).state is JobState.CANCELLED:
        raise typer.Exit(1)


if __name__ == "__main__":
    cli.run(app)
