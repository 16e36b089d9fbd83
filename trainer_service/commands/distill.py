"""The command that teaches a model, and judges what it has gained."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from shared.errors import GptloopError, InvalidArgument
from shared.registry.registry import Registry
from shared.service import cli
from trainer_service import dataset_names
from trainer_service.commands.options import (
    DATASETS,
    AfterOption,
    FollowOption,
    NameOption,
    NeedsOption,
    NotesOption,
    OverridesOption,
    ResumeOption,
    ValidationOption,
    enqueue_job,
    follow_job,
    job_ids,
    queue_of,
    require_worker,
    settings,
    version_number,
)
from trainer_service.distillation.trial import Trial, trial_of_generations, trial_of_stories, trial_of_teachers
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import JobRequest, TrainRequest, parse_overrides
from trainer_service.jobs.specs import RunSpec, check_name
from trainer_service.presets import PRESETS

app = cli.new_app(None)


@app.command()
def distill(
    teachers: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEACHER", help="Versions whose mean prediction the student learns: numbers or labels."),
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}. Default: that of the first teacher.")
    ] = "",
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help=f"{DATASETS}the text of the first teacher.")
    ] = None,
    validation: ValidationOption = None,
    resume: ResumeOption = "",
    overrides: OverridesOption = "",
    name: NameOption = "",
    notes: NotesOption = "",
    generations: Annotated[
        int | None,
        typer.Option("--generations", help="Train a chain of this many models, each taught by the one before it."),
    ] = None,
    stories: Annotated[
        str, typer.Option("--stories", help="Teach from this set of a large teacher's stories.", metavar="NAME")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Let versions that are hardly trained teach and be taught.")
    ] = False,
    promote: Annotated[
        bool, typer.Option("--promote", help="Make the student the stable version if it is better than every rival.")
    ] = False,
    needs: NeedsOption = "",
    after: AfterOption = None,
    wait: FollowOption = True,
) -> None:
    """Teach a model, and judge it beside a control that had no teacher.

    Queues the student, a control that trains on as many tokens without the teacher, and an evaluation that compares the
    student with the control, the teachers and the version that it continues. With --generations the first generation is
    the control, and the last one the student. A report of all versions follows, also as Markdown and as HTML. The last
    line is JSON.

    \b
    Examples:
      gptloop distill 7
      gptloop distill 3 7 --preset small --set "max_steps=2000"
      gptloop distill --generations 3 --preset demo
      gptloop distill --stories bedtime --resume 7 --promote
    """
    given = settings()
    registry = given.open_registry()
    numbers = [version_number(word, registry) for word in " ".join(teachers or ()).split()]
    if [bool(numbers), generations is not None, bool(stories)].count(True) != 1:
        raise InvalidArgument(
            "Name one kind of teacher: versions, as in `gptloop distill 3 7`, or --generations, or --stories."
        )
    common = TrainRequest(
        preset=preset,
        dataset=dataset_names.expand(dataset or ()),
        validation=dataset_names.expand(validation or ()),
        resume=version_number(resume, registry) if resume else None,
        overrides=parse_overrides(overrides),
        name=name,
        notes=notes,
        force=force,
        after=job_ids(after),
        needs=needs,
    )
    if numbers:
        trial = trial_of_teachers(common, numbers, registry)
    elif generations is not None:
        trial = trial_of_generations(common, generations)
    else:
        trial = trial_of_stories(common, stories, registry)
    queue = queue_of(given)
    evaluation = replace(trial.evaluation, promote=promote, needs=needs)
    jobs = _enqueue(replace(trial, evaluation=evaluation), queue, registry)
    require_worker(queue, jobs[0])
    if not wait:
        print(f"The verdict ends the last job: gptloop watch {jobs[-1].id}")
        return
    for job in jobs:
        assert job.spec is not None
        print(f"job {job.id}: {job.spec.kind.value} {job.spec.run}", flush=True)
        follow_job(queue, job.id)
    # Imported now, because plots load slowly and queueing needs none.
    from trainer_service.commands.reports import evaluation_of, print_evaluation, read_record

    student = evaluation_of(jobs[-1].id, queue, registry)
    rivals = student.verdict.rivals if student.verdict else ()
    records = [read_record(each.version.number, each.method_digest, registry) for each in rivals]
    print_evaluation([*records, student], registry)


def _enqueue(trial: Trial, queue: JobQueue, registry: Registry) -> list[JobRecord]:
    """Queues the jobs of a trial and returns them, the evaluation last; if one is refused, cancels the others."""
    for run in trial.runs:
        check_name(run.name)
    jobs = list[JobRecord]()

    def enqueue(request: JobRequest, before: Sequence[JobRecord]) -> None:
        after = (*request.after, *(job.id for job in before))
        # A set of stories may grow between two of the runs.
        first = jobs[0].spec if jobs else None
        stories = first.stories if isinstance(first, RunSpec) else None
        jobs.append(enqueue_job(replace(request, after=after), queue, registry, stories))

    try:
        for run in trial.runs:
            enqueue(run, jobs[-1:] if trial.is_chain else ())
        enqueue(trial.evaluation, jobs)
    except BaseException:
        for job in jobs:
            with suppress(GptloopError):  # it has just ended by itself
                queue.cancel(job.id)
        raise
    return jobs
