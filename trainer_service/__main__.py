"""The trainer's commands: queue jobs, follow them, run the processes of the service."""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import grpc_logs, interrupts

    interrupts.end_quietly()
    grpc_logs.silence()

import asyncio
import os
from typing import Annotated

import typer

from shared.service import cli, logs, traces
from trainer_service.commands import backup, distill, evaluation, history, jobs, registry, stories, sweep
from trainer_service.commands.options import settings
from trainer_service.redis_server import run

app = cli.new_app(__doc__)
for group in (
    *(jobs.app, sweep.app, distill.app, evaluation.app),
    *(stories.app, history.app, registry.app, backup.app),
):
    app.add_typer(group)


@app.command()
def serve() -> None:
    """Run the trainer's API: gRPC TrainingService and the metrics page."""
    from trainer_service import server

    logs.configure("trainer", more_ids=traces.ids)
    traces.start("trainer")
    asyncio.run(server.serve(settings()))


@app.command()
def work() -> None:
    """Run a worker: takes jobs from the queue, one at a time."""
    from trainer_service.jobs import worker

    logs.configure("worker")
    worker.work(settings())


@app.command()
def rank(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The id of the job.")],
    attempt: Annotated[int | None, typer.Argument(min=1, metavar="ATTEMPT", help="Its attempt.")] = None,
) -> int:
    """Run one rank of a job, as a launcher starts it; without an attempt, rank 0 takes the job when it waits."""
    from trainer_service.ranks.rank import run_rank

    return run_rank(job, attempt)


@app.command()
def redis() -> None:
    """Run the embedded Redis below GPTLOOP_VAR, in the foreground."""
    run(settings().directories, logs.read_log_settings(os.environ).level)


if __name__ == "__main__":
    cli.run(app)
