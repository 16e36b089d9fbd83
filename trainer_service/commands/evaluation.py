"""Commands that evaluate versions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from shared.errors import InvalidArgument
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from shared.service import cli
from trainer_service import dataset_names
from trainer_service.commands.options import (
    DATASETS,
    AfterOption,
    FollowOption,
    NeedsOption,
    ValidationOption,
    follow_job,
    job_ids,
    settings,
    submit_job,
    version_number,
)
from trainer_service.jobs.requests import EvaluateRequest

app = cli.new_app(None)


@app.command()
def evaluate(
    versions: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers or labels. Default: the best version and the one before it in its run."),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help=f"{DATASETS}the text of the first version's training.")
    ] = None,
    validation: ValidationOption = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pairs", help="Files of minimal pairs, in BLiMP's format, given in the same way. Repeatable."),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and memory too.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure again what has been measured before.")] = False,
    judge: Annotated[
        float,
        typer.Option(
            "--judge",
            help="Let the large teacher judge the texts of the last version beside those of the others, for at most "
            "this many US dollars.",
            min=0.0,
        ),
    ] = 0.0,
    needs: NeedsOption = "",
    after: AfterOption = None,
    wait: FollowOption = True,
) -> None:
    """Evaluate versions on the whole held-out text and compare them.

    A job for each version measures how well it predicts text, what it writes, how fast it is and what memory it takes.
    It keeps this as a record in the registry, and measures nothing twice. A report of all versions follows, also as
    Markdown and as HTML. With --no-follow the command returns at once; run it again for the report. The last line is
    JSON. With --after a label is resolved when the job begins.

    \b
    Examples:
      gptloop eval
      gptloop eval 7
      gptloop eval 3 7 best --dataset stories.txt
      gptloop eval 3 7 --judge 0.50
    """
    common = EvaluateRequest(
        dataset=dataset_names.expand(dataset or ()),
        validation=dataset_names.expand(validation or ()),
        pairs=dataset_names.expand(pairs or ()),
        speed=speed,
        again=again,
        judge_usd=judge,
        after=job_ids(after),
        needs=needs,
    )
    if judge:
        # The job would find out late that one is missing.
        settings().groq.prices()
        settings().groq.read_key()
    registry = settings().open_registry()
    asked = requests(" ".join(versions or ()).split(), common, registry)
    for each in asked:
        # Nothing is queued if one of them is refused.
        each.resolve(registry)
    jobs = [submit_job(each) for each in asked]
    if not wait:
        return
    for queue, job in jobs:
        follow_job(queue, job.id)
    # Imported now, because plots load slowly and queueing needs none.
    from trainer_service.commands.reports import evaluation_of, print_evaluation

    print_evaluation([evaluation_of(job.id, queue, registry) for queue, job in jobs], registry)


def requests(words: Sequence[str], common: EvaluateRequest, registry: Registry) -> list[EvaluateRequest]:
    """Returns a request for each version that some numbers and labels name, so that their records compare.

    Without words: the best version and the one before it in its run. The others are the rivals of the last one, if a
    judge is asked for. Raises `NotFound` or `InvalidArgument` if a word does not name a version, or if the judge has
    nothing to compare.
    """
    if common.judge_usd and common.after:
        raise InvalidArgument("--judge compares versions that exist, so it does not go with --after.")
    if common.after:
        if len(words) > 1:
            raise InvalidArgument("--after takes one version: several are compared when all of them exist.")
        return [replace(common, version=words[0] if words else "best")]
    named = [registry.version(version_number(word, registry)) for word in words] or _best_and_the_one_before(registry)
    versions = list({version.version: version for version in named}.values())
    if len(versions) > 1:
        # What all of them have in common.
        common = replace(common, window=min(_context_length(version) for version in versions))
        if not (common.dataset or common.validation):
            first = versions[0]
            common = replace(common, dataset=first.dataset_files, validation=first.validation_files)
    elif common.judge_usd:
        raise InvalidArgument("--judge needs two versions or more: the last one is judged beside each of the others.")
    *others, last = versions
    rivals = {f"rival {other.version}": str(other.version) for other in others} if common.judge_usd else {}
    return [
        *(replace(common, version=str(other.version), judge_usd=0.0) for other in others),
        replace(common, version=str(last.version), rivals=rivals),
    ]


def _best_and_the_one_before(registry: Registry) -> list[VersionManifest]:
    best = registry.resolve("best")
    before = [each for each in registry.versions() if each.run == best.run and each.version < best.version]
    return [*before[-1:], best]


def _context_length(version: VersionManifest) -> int:
    return int(version.model["context_length"])
