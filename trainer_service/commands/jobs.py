"""Commands that queue jobs, follow them, and list them."""

from typing import Annotated

import typer

from shared.errors import InvalidArgument
from shared.gpt.tokenizer import Tokenizer
from shared.service import cli
from shared.service.lists import JsonOption
from trainer_service import dataset_names, listings
from trainer_service.commands.options import (
    AfterOption,
    DatasetOption,
    FollowOption,
    JobArgument,
    NameOption,
    NeedsOption,
    NotesOption,
    OverridesOption,
    PresetOption,
    ResumeOption,
    ValidationOption,
    follow_job,
    job_ids,
    queue_of,
    settings,
    submit_job,
    version_number,
)
from trainer_service.jobs.attempt import shared_tokens
from trainer_service.jobs.requests import DEFAULT_DATASET, DEFAULT_PRESET, PrepareRequest, TrainRequest, parse_overrides
from trainer_service.jobs.specs import Kind
from trainer_service.presets import find_preset
from trainer_service.runs import all_runs, chosen
from trainer_service.text.corpus import DatasetSpec, check_spec
from trainer_service.training.batches import Tokens

app = cli.new_app(None)


@app.command()
def train(
    preset: PresetOption = "",
    dataset: DatasetOption = None,
    validation: ValidationOption = None,
    resume: ResumeOption = "",
    overrides: OverridesOption = "",
    only_prepare: Annotated[
        bool, typer.Option("--only-prepare", help="Prepare the tokens of the run and do not train.")
    ] = False,
    name: NameOption = "",
    notes: NotesOption = "",
    needs: NeedsOption = "",
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
        resume=version_number(resume, settings().open_registry()) if resume else None,
        overrides=parse_overrides(overrides),
        name=name,
        notes=notes,
        after=job_ids(after),
        needs=needs,
    )
    queue, record = submit_job(_preparation(request) if only_prepare else request)
    if wait:
        follow_job(queue, record.id)


def _preparation(request: TrainRequest) -> PrepareRequest:
    if request.name or request.notes:
        raise InvalidArgument("--name and --notes describe a run, but --only-prepare trains none; leave them out.")
    values = {name: value for name, value in vars(request).items() if name not in ("name", "notes")}
    return PrepareRequest(**values)


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
      gptloop prepare --dataset "builtin teacher:bedtime"
    """
    from trainer_service.text import tokens

    config = find_preset(preset).override(parse_overrides(overrides))
    spec = DatasetSpec(dataset_names.expand(dataset or (DEFAULT_DATASET,)), dataset_names.expand(validation or ()))
    check_spec(spec)
    with cli.Stages() as stages:
        directories = settings().directories
        prepared = tokens.prepare(spec, config, directories.data, stages.show, shared=shared_tokens(directories))
    for notice in prepared.notices:
        print(f"note: {notice}")
    teacher = prepared.teacher
    share = config.teacher_share if teacher else 0.0
    read = config.max_steps * config.tokens_per_step
    epochs = (1 - share) * read / prepared.train.size
    print(f"source      {prepared.source} ({prepared.revision[:12]})")
    print(f"tokenizer   {prepared.tokenizer.name}, {prepared.tokenizer.vocabulary_size:,} tokens")
    print(f"training    {prepared.train.size:,} tokens, read {epochs:,.2f} times in {config.max_steps:,} steps")
    print(f"held out    {prepared.validation.size:,} tokens")
    _print_sample(prepared.train, prepared.tokenizer)
    if teacher:
        epochs = share * read / teacher.tokens.size
        print(f"teacher     {teacher.tokens.size:,} tokens, read {epochs:,.2f} times, in {share:.0%} of the windows")
        _print_sample(teacher.tokens, prepared.tokenizer)


def _print_sample(tokens: Tokens, tokenizer: Tokenizer) -> None:
    print("sample      " + tokenizer.decode(tokens[:80].tolist()).replace("\n", " ") + " …")


@app.command()
def watch(job: JobArgument) -> None:
    """Follow a job from its first event until it ends.

    Example: gptloop watch 3f2a91c4
    """
    queue = queue_of(settings())
    queue.store.get(job)
    follow_job(queue, job)


@app.command()
def cancel(job: JobArgument) -> None:
    """Ask a job to end.

    A running job finishes its step and keeps its state.

    Example: gptloop cancel 3f2a91c4
    """
    record = queue_of(settings()).cancel(job)
    print(f"job {job} is {record.state.value}")


@app.command()
def jobs(as_json: JsonOption = False) -> None:
    """List the jobs, the newest first.

    \b
    Examples:
      gptloop jobs
      gptloop jobs --json
    """
    listings.print_jobs(list(queue_of(settings()).store.jobs()), as_json)


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
    given = settings()
    found = all_runs(queue_of(given).store.jobs(kinds=[Kind.TRAIN]), given.open_registry())
    listings.print_runs(chosen(found, " ".join(names or ()).split()), as_json)
