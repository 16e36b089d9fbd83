"""Compares models that learn from a teacher's predictions with models trained as long, on as many tokens, without one.

python -m tests.benchmarks.distillation --help. Every command prints each evaluation and then a table; all losses are on
the whole held-out text. A command that reached `--minutes` goes on where it stopped when it is given again.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.device import accelerator
from shared.errors import InvalidArgument, shown
from shared.service import cli
from tests.benchmarks.material import Material
from tests.benchmarks.side_by_side import ROOT, print_table
from trainer_service.presets import PRESETS
from trainer_service.training.config import TrainingConfig

if TYPE_CHECKING:
    from tests.benchmarks.runs import Run, Runs
    from trainer_service.evaluation.record import Interval

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Size:
    """The values of a teacher and of its students."""

    teacher: TrainingConfig
    student: TrainingConfig


def _sizes() -> dict[str, Size]:
    # Minutes on two cores.
    demo = replace(
        PRESETS["demo"],
        optimizer="adamw",
        learning_rate=3e-3,
        max_steps=400,
        evaluation_interval=200,
        validation_share=0.05,
    )
    # One NVIDIA GPU. The text is read about fifty times, hence the strong regularization.
    large = replace(
        PRESETS["tinystories-53m"],
        max_steps=3000,
        batch_size=24,
        learning_rate=6e-4,
        warmup_steps=300,
        dropout=0.3,
        weight_decay=0.3,
        evaluation_interval=500,
        validation_share=0.1,
    )
    return {
        "small": Size(demo, replace(demo, layers=2, width=96, heads=3, hidden_width=384)),
        "large": Size(large, large),
    }


SIZES = _sizes()

SizeName = Annotated[str, typer.Option("--size", help="small: minutes on two cores; large: 53M, one NVIDIA GPU.")]
Folder = Annotated[Path, typer.Option("--text", help="Folder of the tokens, read if no files are named.")]
Work = Annotated[Path, typer.Option("--work", help="Folder of weights and outcomes.")]
Dataset = Annotated[
    list[str], typer.Option(help="Files of text. Repeatable; default: TinyStories in GPTLOOP_TEST_DATA.")
]
Values = Annotated[list[str], typer.Option("--set", help="name=value of a run, for teachers and students. Repeatable.")]
StudentValues = Annotated[
    list[str], typer.Option("--student-set", help="name=value of the students and the control alone. Repeatable.")
]
Copy = Annotated[Path | None, typer.Option("--out", help="File that receives all outcomes after each run.")]
Minutes = Annotated[float, typer.Option("--minutes", help="Stop before this time; 0 means no limit.")]

TEXT, WORK = ROOT / "var/bench/distillation/text", ROOT / "var/bench/distillation/work"


@app.command()
def prepare(size: SizeName = "small", text: Folder = TEXT, dataset: Dataset = [], values: Values = []) -> None:  # noqa: B006
    """Write the tokens of the text, which then can be carried to another machine."""
    print(_material(text / size, dataset, _size(size, values)))


@app.command()
def students(
    size: SizeName = "small",
    text: Folder = TEXT,
    work: Work = WORK,
    dataset: Dataset = [],  # noqa: B006
    values: Values = [],  # noqa: B006
    student_values: StudentValues = [],  # noqa: B006
    alpha: Annotated[list[float], typer.Option(help="Repeatable; default: that of a run.")] = [],  # noqa: B006
    temperature: Annotated[list[float], typer.Option(help="Repeatable; default: that of a run.")] = [],  # noqa: B006
    seed: int = 1,
    out: Copy = None,
    minutes: Minutes = 0,
) -> int:
    """Train a teacher, a control, and a student for each alpha and temperature; the students have the control's seed.

    The exit code is 1 unless the paired interval of each student shows that it is better than the control.
    """
    chosen = _size(size, values)
    with _runs(text / size, dataset, chosen, work, out, minutes) as runs:
        from tests.benchmarks.runs import Run

        teacher = Run("teacher", replace(chosen.teacher, seed=seed))
        plain = replace(chosen.student.override(_parsed(student_values)), seed=seed + 1)
        control = Run("control", plain)
        plan = [Comparison(["teacher", "", ""], teacher, control), Comparison(["control", "", ""], control, control)]
        for t in temperature or [plain.distillation_temperature]:
            for a in alpha or [plain.distillation_alpha]:
                config = replace(plain, distillation_alpha=a, distillation_temperature=t)
                student = Run(f"student, alpha {a:g}, temperature {t:g}", config, (teacher,))
                plan.append(Comparison(["student", f"{a:g}", f"{t:g}"], student, control))
        intervals = _report(runs, ["model", "alpha", "temperature"], "control", plan)[2:]
    return int(not intervals or any(interval is None or interval.high >= 0 for interval in intervals))


@app.command()
def chain(
    size: SizeName = "large",
    text: Folder = TEXT,
    work: Work = WORK,
    dataset: Dataset = [],  # noqa: B006
    values: Values = [],  # noqa: B006
    generations: int = 3,
    seed: Annotated[list[int], typer.Option(help="Seed of a first generation. Repeatable.")] = [1, 11],  # noqa: B006
    out: Copy = None,
    minutes: Minutes = 0,
) -> None:
    """Train generations that each learn from the one before, then students of all first generations together."""
    config = _size(size, values).student
    with _runs(text / size, dataset, Size(config, config), work, out, minutes) as runs:
        from tests.benchmarks.runs import Run

        first = [Run(f"g1 of seed {each}", replace(config, seed=each)) for each in seed]
        plan = []
        for run in first:
            base, label = run.config.seed, str(run.config.seed)
            plan.append(Comparison([label, "g1", "none"], run, run))
            last = run
            for number in range(2, generations + 1):
                last = Run(f"g{number} of seed {base}", replace(config, seed=base + number - 1), (last,))
                plan.append(Comparison([label, f"g{number}", f"g{number - 1}"], last, run))
        for run in first if len(first) > 1 else []:
            student = Run(
                f"student of all g1, seed {run.config.seed}", replace(config, seed=run.config.seed + 1), (*first,)
            )
            plan.append(Comparison([str(run.config.seed), "g2", f"all {len(first)} g1"], student, run))
        _report(runs, ["seed", "model", "teachers"], "g1", plan)


@app.command()
def speed(
    size: SizeName = "large",
    text: Folder = TEXT,
    dataset: Dataset = [],  # noqa: B006
    values: Values = [],  # noqa: B006
    rows: Annotated[list[int], typer.Option(help="Rows of a batch. Repeatable.")] = [12, 24, 64],  # noqa: B006
    rounds: int = 5,
    steps: int = 20,
    out: Annotated[Path | None, typer.Option("--out", help="File that receives the figures after each row.")] = None,
) -> None:
    """Measure a step without a teacher and with one of the same size, in turn; print medians and their ratio."""
    device = accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")
    config = _size(size, values).student
    material = _material(text / size, dataset, Size(config, config))
    from tests.benchmarks.step_times import StepTimes, measure_steps
    from trainer_service.training.workers import Workers

    found: list[StepTimes] = []
    with Workers(device.threads) as workers:
        for count in rows:
            found.append(measure_steps(replace(config, batch_size=count), material, workers, rounds, steps))
            print(found[-1], flush=True)
            if out:
                out.write_text(json.dumps([asdict(each) for each in found]))
    print_table(StepTimes.COLUMNS, [each.cells for each in found])


@dataclass(frozen=True)
class Comparison:
    """A row of a table: its first cells, a run, and the run that it is compared with."""

    labels: list[str]
    run: "Run"
    other: "Run"


def _report(runs: "Runs", columns: list[str], other: str, plan: Sequence[Comparison]) -> list["Interval | None"]:
    """Does the runs of a plan, prints the table of those that ended in time, and returns their paired intervals."""
    from tests.benchmarks.runs import OutOfTime

    rows, intervals = list[list[str]](), list["Interval | None"]()
    try:
        for each in plan:
            outcome = runs.outcome(each.run)
            nats, interval = outcome.difference_from(runs.outcome(each.other))
            figures = [
                f"{outcome.nats:.4f}",
                f"{outcome.bits_per_byte:.4f}",
                f"{outcome.step}",
                f"{outcome.last_nats:.4f}",
            ]
            compared = ["", ""]
            if each.run != each.other:
                compared = [f"{nats:+.4f}", f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else "unknown"]
            rows.append([*each.labels, *figures, *compared, f"{outcome.seconds:.0f} s"])
            intervals.append(interval)
    except OutOfTime:
        print("The time limit is reached; the same command goes on from here.")
    headings = ["best loss", "bits per byte", "at step", "last loss", f"from {other}", "95 % interval", "training"]
    print_table([*columns, *headings], rows)
    return intervals


def _size(name: str, values: Sequence[str]) -> Size:
    if name not in SIZES:
        raise InvalidArgument(f"size is {shown(name)}, but must be one of {', '.join(SIZES)}.")
    chosen = SIZES[name]
    return Size(chosen.teacher.override(_parsed(values)), chosen.student.override(_parsed(values)))


def _parsed(values: Sequence[str]) -> dict[str, str]:
    return dict(each.partition("=")[::2] for each in values)


def _material(text: Path, dataset: Sequence[str], size: Size) -> Material:
    """Prepares the text from its files, or without files returns what an earlier command prepared."""
    folder = os.environ.get("GPTLOOP_TEST_DATA")
    if not dataset and folder:
        dataset = [f"{folder}/tinystories/train-v{number}.txt" for number in (1, 2)]
    if dataset:
        return Material.prepare(dataset, size.teacher, text)
    if not Material.exists(text):
        raise InvalidArgument(f"{text} holds no tokens: name files with --dataset, or set GPTLOOP_TEST_DATA.")
    return Material.load(text)


@contextmanager
def _runs(
    text: Path, dataset: Sequence[str], size: Size, work: Path, out: Path | None, minutes: float
) -> Iterator["Runs"]:
    end_s = time.monotonic() + minutes * 60 if minutes else math.inf
    device = accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")
    from tests.benchmarks.runs import Runs
    from trainer_service.training.workers import Workers

    material = _material(text, dataset, size)
    print(material, flush=True)
    with Workers(device.threads) as workers:
        yield Runs(material, workers, work, out, end_s)


if __name__ == "__main__":
    cli.run(app)
