"""The command that pays a large teacher for stories."""

from typing import Annotated

import typer

from shared.service import cli
from trainer_service.commands.options import AfterOption, FollowOption, follow_job, job_ids, settings, submit_job
from trainer_service.distillation.estimate import estimate
from trainer_service.distillation.ledger import read_account, stories_folder
from trainer_service.jobs.requests import StoriesRequest

app = cli.new_app(None)


@app.command()
def stories(
    count: Annotated[int, typer.Option(help="How many stories the set shall have.")],
    max_cost: Annotated[float, typer.Option(help="The most that the set may cost in all, in US dollars.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the set.")] = "stories",
    after: AfterOption = None,
    wait: FollowOption = True,
) -> None:
    """Pay a large teacher for stories to learn from.

    Prints what they will cost, queues a job that asks for them, and follows it. The job stops before the set can cost
    more than --max-cost; the same command with a higher --max-cost or --count continues the set. Nothing is paid for
    twice. The key and the prices of the teacher come from settings: GROQ_API_KEY, GPTLOOP_GROQ_INPUT_USD and
    GPTLOOP_GROQ_OUTPUT_USD.

    \b
    Examples:
      gptloop stories --count 2000 --max-cost 0.50
      gptloop stories animals --count 20000 --max-cost 4 --no-follow
    """
    request = StoriesRequest(name=name, count=count, max_cost_usd=max_cost, after=job_ids(after))
    given = settings()
    spec = request.resolve(given.open_registry())
    prices = given.groq.prices()
    given.groq.read_key()
    account = read_account(stories_folder(given.directories.data, name))
    print(estimate(spec, account, prices, given.groq.model))
    queue, record = submit_job(request)
    if wait:
        follow_job(queue, record.id)
