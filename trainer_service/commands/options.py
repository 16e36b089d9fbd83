"""What the commands have in common: their options, and how they reach the queue and the registry."""

import os
from itertools import islice
from typing import Annotated

import typer
from rich.console import Console

from shared.errors import InvalidArgument, Unavailable, shown
from shared.registry.registry import Registry
from trainer_service.follow import follow
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import DEFAULT_PRESET, JobRequest
from trainer_service.jobs.specs import TrainSpec
from trainer_service.jobs.submit import on_this_machine, submit
from trainer_service.plan import Machine, Plan
from trainer_service.presets import PRESETS
from trainer_service.redis_client import connect
from trainer_service.settings import TrainerSettings, read_settings

PresetOption = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}; default {DEFAULT_PRESET}.")]
DATASETS = (
    "builtin, roneneldan/TinyStories, wikitext-103; or text files, folders and patterns; or teacher:NAME, stories of a "
    "large teacher, alone or beside one of these. Put quotes around a name with spaces. Repeatable. Default: "
)
DatasetOption = Annotated[list[str] | None, typer.Option("--dataset", help=f"{DATASETS}builtin.")]
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
ResumeOption = Annotated[
    str,
    typer.Option(
        "--resume", help="The version to continue, with its text and values: a number, or a label such as best."
    ),
]
NameOption = Annotated[str, typer.Option("--name", help="The name of the run. Default: a new one.")]
NotesOption = Annotated[str, typer.Option("--notes", help="A note on the run, which `gptloop runs` shows.")]
AfterOption = Annotated[
    list[str] | None, typer.Option("--after", help="Jobs that must finish first. Repeatable.", metavar="JOB")
]
NeedsOption = Annotated[
    str,
    typer.Option(
        "--needs",
        help="What the job needs of a worker, as in gpu,memory=16G. Workers without it leave the job to others.",
    ),
]
JobArgument = Annotated[str, typer.Argument(help="The id of the job, as `gptloop jobs` lists it.")]
FollowOption = Annotated[bool, typer.Option("--follow/--no-follow", help="Follow the job until it ends.")]


# A plan takes the speed and the size of text from the newest jobs.
JOBS_TO_LEARN_FROM = 200


def settings() -> TrainerSettings:
    """Returns the settings of this process."""
    return read_settings(os.environ)


def queue_of(given: TrainerSettings) -> JobQueue:
    """Returns the queue of the registry that the settings name."""
    return JobQueue(connect(given.redis), given.open_registry().store.id())


def version_number(text: str, registry: Registry) -> int:
    """Returns the number of a version that a number or a label names; raises `NotFound` if it does not exist."""
    try:
        return registry.named(text).version
    except InvalidArgument:
        raise InvalidArgument(
            f"The version is {shown(text)}, but must be a number or a label, such as best, latest or run:<name>."
        ) from None


def job_ids(values: list[str] | None) -> tuple[str, ...]:
    """Returns the ids in some values, each of which may hold several."""
    return tuple(job for value in values or () for job in value.split())


def submit_job(request: JobRequest) -> tuple[JobQueue, JobRecord]:
    """Queues a job and prints its id and its plan; raises `Unavailable` if no worker is running."""
    given = settings()
    queue = queue_of(given)
    record = enqueue_job(request, queue, given.open_registry())
    require_worker(queue, record)
    return queue, record


def enqueue_job(request: JobRequest, queue: JobQueue, registry: Registry, stories: int | None = None) -> JobRecord:
    """Queues a job and prints its id and its plan. `stories`: how many stories it reads, if it reads any."""
    plan = list[str]()
    data = settings().directories.data
    spec = on_this_machine(request.resolve(registry), request.after, data, queue.store, stories)
    if isinstance(spec, TrainSpec):
        earlier = islice(queue.store.jobs(), JOBS_TO_LEARN_FROM)
        plan = Plan.of(spec, registry, earlier, Machine.here()).lines()
    record = submit(spec, queue, registry, request.after)
    print(f"job {record.id} queued: {spec.kind.value} {spec.run}", *plan, sep="\n", flush=True)
    return record


def require_worker(queue: JobQueue, record: JobRecord) -> None:
    """Raises `Unavailable` if no worker is running; prints a note if a job needs what none of them has."""
    # Several ranks may also be started by a cluster, which then takes the job.
    if record.needs.ranks == 1 and not queue.store.workers.count():
        raise Unavailable(
            f"No worker is running. Start one with `gptloop up`; the job {record.id} stays queued until then."
        )
    if record.awaited:
        print(f"note: The job waits for {record.awaited}; none is running.", flush=True)


def follow_job(queue: JobQueue, job: str) -> None:
    """Shows a job until it ends. Ctrl-C leaves it running; a cancelled job ends the command with the code 1."""
    try:
        follow(queue, job, Console())
    except KeyboardInterrupt:
        print(f"The job goes on. Follow it again with `gptloop watch {job}`, end it with `gptloop cancel {job}`.")
        raise typer.Exit(130) from None
    if queue.store.get(job).state is JobState.CANCELLED:
        raise typer.Exit(1)
