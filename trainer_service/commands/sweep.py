"""The command that tries a small grid of training values, and stops the worst candidates early."""

import shlex
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared.atomic_file import replacing
from shared.errors import GptloopError, InvalidArgument, Unavailable, shown
from shared.gpt.config import count_parameters
from shared.registry.registry import Registry
from shared.registry.retention import Retention
from shared.service import cli
from shared.service.lists import JsonOption, print_list
from shared.text import format_duration, format_size, printable
from trainer_service import dataset_names
from trainer_service.commands.options import (
    JOBS_TO_LEARN_FROM,
    DatasetOption,
    NeedsOption,
    OverridesOption,
    PresetOption,
    ValidationOption,
    queue_of,
    require_worker,
    settings,
)
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest, parse_overrides
from trainer_service.jobs.specs import new_run
from trainer_service.plan import Machine, Plan, count_moments
from trainer_service.settings import TrainerSettings
from trainer_service.sweep.follow import follow
from trainer_service.sweep.grid import members, parse_tries
from trainer_service.sweep.halving import Halving
from trainer_service.sweep.results import Result, columns, report, results
from trainer_service.sweep.sweep import Sweep

app = cli.new_app(None)

_MOST_RUNGS = 10
_LEAST_SHARE, _GREATEST_SHARE = Fraction(1, 100), Fraction(9, 10)
_LONGEST_SHARE = 10
# Measured with a small model: the best of eight candidates was the fourth at twice the steps of the warm-up, and the
# first from three times as many on.
_SETTLED = 3


@app.command()
def sweep(
    tried: Annotated[
        str, typer.Option("--try", help='Values to combine, as in "learning_rate=1e-3,3e-3 dropout=0,0.1".')
    ],
    preset: PresetOption = "",
    dataset: DatasetOption = None,
    validation: ValidationOption = None,
    overrides: OverridesOption = "",
    name: Annotated[
        str, typer.Option("--name", help="The name of the sweep; its runs are NAME-1, NAME-2 … Default: a new one.")
    ] = "",
    rungs: Annotated[
        int, typer.Option("--rungs", min=1, max=_MOST_RUNGS, help="At how many steps candidates are compared.")
    ] = 2,
    keep: Annotated[
        str, typer.Option("--keep", help="The share of the candidates that goes on from a rung to the next.")
    ] = "1/3",
    needs: NeedsOption = "",
    wait: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Follow the sweep until it ends, or only do what is due now.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Try a grid of training values, and stop the worst candidates early.

    Each combination of the values is a candidate: a run that trains along its whole schedule. All have one seed and
    one text, so they read it in the same order, unless you try a value that changes it, such as seed or batch_size. At
    each rung, a step of the schedule, candidates wait for one another, and the share with the lowest held-out loss
    goes on. One that fails counts as the worst. A table and a page with a plot follow.

    The command decides between rungs. Without it, candidates train to their next rung and wait there. The same command
    with the same --name goes on, also after a kill; with --no-follow it does what is due and prints what is known.

    \b
    Examples:
      gptloop sweep --try "learning_rate=1e-3,3e-3,6e-3 weight_decay=0.1,0.3"
      gptloop sweep --try "dropout=0,0.1,0.2" --preset small --dataset stories.txt --name drop
      gptloop sweep --try "learning_rate=1e-3,3e-3 seed=1,2" --rungs 3 --keep 1/2
    """
    given = settings()
    registry, console = given.open_registry(), Console(stderr=as_json)

    def say(*lines: str) -> None:
        for line in lines:
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    common = TrainRequest(
        preset=preset,
        dataset=dataset_names.expand(dataset or ()),
        validation=dataset_names.expand(validation or ()),
        overrides=parse_overrides(overrides),
        name=name or new_run("sweep"),
        needs=needs,
    )
    found = members(common, parse_tries(tried), registry)
    config = found[0].spec.config
    halving = Halving.of(len(found), config.max_steps, config.evaluation_interval, rungs, parse_share(keep))
    queue = queue_of(given)
    running = Sweep(common.name, found, halving, queue, registry, given.directories.data)
    begun = running.begin()
    say(*_plan(running, queue, registry, given.retention))
    if begun:
        say(f"{begun} of the candidates were queued before, so the sweep goes on.")
    again = f"Give the same command with --name {common.name} to go on."
    try:
        if wait and (left := [job for job in running.jobs() if not job.state.is_final]):
            require_worker(queue, left[0])
        turn = follow(running, queue, console) if wait else running.turn()
    except KeyboardInterrupt:
        say(f"The candidates train on to their next rung. {again}")
        raise typer.Exit(130) from None
    except Unavailable as error:
        raise Unavailable(f"{error} {again}") from error
    ranked = results(running, running.jobs(), registry)
    print_list(ranked, columns(ranked, halving), as_json=as_json)
    say(f"page: {_write_page(running, ranked, given)}")
    if not turn.is_over:
        say(f"The sweep is not over. {again}")
    elif not ranked[0].rungs:
        raise GptloopError(
            f"No candidate came to a rung; candidate 1: {turn.jobs[0].reason or turn.jobs[0].state.value}"
        )
    else:
        say(*_winner(ranked[0], common, halving))


def parse_share(text: str) -> Fraction:
    """Reads `1/3` or `0.5`; raises `InvalidArgument` if it is not a share."""
    # Eight digits of an exponent would take minutes and gigabytes.
    is_plain = len(text) <= _LONGEST_SHARE and text.isascii() and "e" not in text.lower()
    try:
        share = Fraction(text) if is_plain else None
    except (ValueError, ZeroDivisionError):
        share = None
    if share is None or not _LEAST_SHARE <= share <= _GREATEST_SHARE:
        raise InvalidArgument(
            f"--keep is {shown(text)}, but must be a share from {_LEAST_SHARE} to {_GREATEST_SHARE}, as in 1/3."
        )
    return share


def _plan(running: Sweep, queue: JobQueue, registry: Registry, retention: Retention) -> Iterator[str]:
    """Yields what the sweep will do, and take."""
    halving, count = running.halving, len(running.members)
    yield f"sweep {running.name}: {count} candidates, the runs {running.name}-1 to {running.name}-{count}"
    for rung, (step, size) in enumerate(zip(halving.steps, halving.sizes, strict=True), start=1):
        end = ", the end of the schedule" if rung == len(halving.steps) else ""
        yield f"rung {rung:<6} step {step:,}{end}: {size} candidate{'s' * (size > 1)}"
    yield f"steps       {halving.most_steps:,}, instead of {count * halving.steps[-1]:,} without rungs"
    yield _time(running, queue, registry)
    # The last states and that of the best version, each with weights and moments, and the weights of this version.
    numbers = 0
    for config in (each.spec.config for each in running.members):
        parameters = count_parameters(config.gpt).total
        numbers += (retention.states + 1) * (parameters + count_moments(config)) + parameters
    yield f"disk        up to {format_size(4 * numbers)} for the states and best versions of all candidates"
    warmup_end = max(each.spec.config.warmup_end for each in running.members)
    if halving.steps[0] < min(_SETTLED * warmup_end, halving.steps[-1]):
        yield (
            f"note: Rung 1 comes so soon after the warm-up, which ends at step {warmup_end:,}, that its losses say "
            "little about the end."
        )


def _time(running: Sweep, queue: JobQueue, registry: Registry) -> str:
    halving, machine = running.halving, Machine.here()
    earlier = list(islice(queue.store.jobs(), JOBS_TO_LEARN_FROM))
    plans = [Plan.of(each.spec, registry, earlier, machine) for each in running.members]
    before_s = sum(plan.before_s for plan in plans)
    all_s = [plan.time_s for plan in plans if plan.time_s is not None]
    if len(all_s) < len(plans):
        return "time        known after the first steps"
    # Nobody knows yet which of them go on, so a step counts as one of an average candidate.
    step_s = (sum(all_s) - before_s) / (len(plans) * halving.steps[-1])
    guess = "" if all(plan.tokens_per_second for plan in plans) else "; a guess, known after the first steps"
    return f"time        about {format_duration(before_s + halving.most_steps * step_s)} on one worker{guess}"


def _write_page(running: Sweep, ranked: Sequence[Result], given: TrainerSettings) -> Path:
    # Imported now, because plots load slowly.
    from trainer_service.evaluation.views.html import to_html

    folder = given.directories.reports
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sweep-{running.name}.html"
    with replacing(path) as file:
        file.write(to_html(report(running.name, ranked, running.halving)).encode())
    return path


def _winner(best: Result, common: TrainRequest, halving: Halving) -> Iterator[str]:
    """Yields the best candidate, and the commands that serve it and train with its values."""
    step, loss = max(best.rungs.items())
    yield (
        f"Candidate {best.member.number} is the best: {best.member.text}, held-out loss {loss:.4f} nats per token at "
        f"step {step:,}."
    )
    if step < (last := halving.steps[-1]):
        yield (
            f"note: No candidate came to the end of the schedule, step {last:,}: the last ones failed or were "
            "cancelled."
        )
    if best.version is not None:
        yield f"Serve its best version: gptloop pin {best.version}"
    values = " ".join(f"{name}={value}" for name, value in {**common.overrides, **best.member.values}.items())
    given: dict[str, tuple[str, ...]] = {"--preset": (common.preset,) if common.preset else ()}
    given |= {"--dataset": common.dataset, "--validation": common.validation, "--set": (values,)}
    words = [word for option, texts in given.items() for text in texts for word in (option, shlex.quote(text))]
    yield f"Train with its values:  gptloop train {' '.join(words)}"
