"""Commands that evaluate versions."""

from typing import Annotated

import typer

from shared.service import cli
from trainer_service import dataset_names
from trainer_service.commands.options import (
    DATASETS,
    AfterOption,
    FollowOption,
    ValidationOption,
    follow_job,
    job_ids,
    submit_job,
)
from trainer_service.jobs.requests import EvaluateRequest

app = cli.new_app(None)


@app.command()
def evaluate(
    version: Annotated[
        str, typer.Argument(help="A number, best or latest; a label is resolved when the job starts.")
    ] = "best",
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help=f"{DATASETS}the text that the version was trained with.")
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
        after=job_ids(after),
    )
    queue, record = submit_job(request)
    if wait:
        follow_job(queue, record.id)
