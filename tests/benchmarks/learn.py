"""Compares recipes on real stories, from the classic one to the best one, by the held-out loss of one 53M model.

python -m tests.benchmarks.learn prepare --help, then steps, trial, table or resume
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from shared.atomic_file import replacing
from shared.device import accelerator
from shared.errors import InvalidArgument
from shared.text import format_size
from tests.benchmarks.material import Material
from tests.benchmarks.recipes import RECIPES, Recipe, self_taught
from tests.benchmarks.side_by_side import ROOT, print_table
from trainer_service.jobs.requests import parse_overrides
from trainer_service.presets import find_preset
from trainer_service.training.batches import Batches, Tokens, TrainingText

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Argument(help="Folder of the tokens, the weights and the outcomes.")]

Seeds = Annotated[list[int], typer.Option("--seed", help="Repeatable.")]

# A run ends early if its loss was this much above its best one twice in a row: it will not be better again.
_WORSE = 0.05
# Student's t for an interval of 95 % over some seeds.
_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}

CLASSIC = RECIPES["classic, as it was"].config


@dataclass(frozen=True)
class Outcome:
    """What came of a run: the held-out loss, in nats per token, after some steps; the time of training alone; and the
    most memory that the device held."""

    losses: list[tuple[int, float]]
    seconds: float
    peak_bytes: int

    @property
    def best(self) -> tuple[float, int]:
        """The lowest held-out loss, and the step at which it was measured."""
        return min((loss, step) for step, loss in self.losses)


class Learning:
    """The evaluations of a run, and the time between them."""

    def __init__(self, interval: int, evaluate: Callable[[], float], wait: Callable[[], object]) -> None:
        self.losses: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._interval = interval
        self._evaluate = evaluate
        self._wait = wait
        self._began_s = time.perf_counter()

    def goes_on(self, step: int, last: int) -> bool:
        """Evaluates after this step if it is due; returns whether another step follows."""
        if step % self._interval and step != last:
            return True
        self._wait()
        self.seconds += time.perf_counter() - self._began_s
        self.losses.append((step, self._evaluate()))
        best = min(loss for _, loss in self.losses)
        self._began_s = time.perf_counter()
        return step != last and any(loss <= best + _WORSE for _, loss in self.losses[-2:])


class Study:
    """The runs on one text, whose outcomes and best weights are kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.material = Material.load(folder)

    def outcome(self, recipe: Recipe, seed: int) -> Outcome | None:
        """Returns the outcome of a recipe with a seed; None if it has not been trained."""
        path = self._path(recipe, seed, "json")
        return Outcome(**json.loads(path.read_text())) if path.exists() else None

    def outcomes(self, recipe: Recipe, seeds: Sequence[int]) -> dict[int, Outcome]:
        """Returns the outcomes of a recipe by their seeds."""
        return {seed: found for seed in seeds if (found := self.outcome(recipe, seed))}

    def train_missing(self, recipes: Sequence[Recipe], seeds: Sequence[int], until_s: float) -> None:
        """Does the runs that have no outcome yet; begins none after the monotonic clock shows `until_s`."""
        for seed in seeds:
            for recipe in recipes:
                if self.outcome(recipe, seed) is None and time.monotonic() < until_s:
                    self.train(recipe, seed)

    def train(self, recipe: Recipe, seed: int) -> None:
        """Trains with a recipe, first with its teacher, if that has no outcome, and keeps the outcome."""
        teacher = recipe.teacher
        if teacher and self.outcome(teacher, seed) is None:
            self.train(teacher, seed)
        (self._folder / "runs").mkdir(exist_ok=True)
        if recipe.pytorch:
            outcome = with_pytorch(recipe, seed, self.material)
        else:
            path = self._path(recipe, seed, "safetensors")
            taught_by = self._path(teacher, seed, "safetensors") if teacher else None
            outcome = with_gptloop(recipe, seed, self.material, path, taught_by)
        gc.collect()
        losses = " ".join(f"{step}:{loss:.4f}" for step, loss in outcome.losses)
        print(f"{recipe.name}, seed {seed}: {losses}; {outcome.seconds:.0f} s", flush=True)
        with replacing(self._path(recipe, seed, "json")) as file:
            file.write(json.dumps(asdict(outcome)).encode())

    def _path(self, recipe: Recipe, seed: int, suffix: str) -> Path:
        return self._folder / "runs" / f"{recipe.key(seed)}.{suffix}"


@app.command()
def prepare(
    folder: Folder,
    dataset: Annotated[list[str], typer.Option(help="As in `gptloop train`. Repeatable.")],
    preset: Annotated[str, typer.Option(help="Its tokenizer is used.")] = "tinystories-53m",
) -> None:
    """Write the tokens of the stories; every tenth story is held out."""
    print(Material.prepare(dataset, replace(find_preset(preset), validation_share=0.1), folder))


@app.command()
def steps(
    folder: Folder,
    seed: Seeds = [1, 2, 3],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="A recipe by its name. Repeatable; default: all.")] = [],  # noqa: B006
    minutes: Annotated[float, typer.Option(help="Begin no run after this time; 0 means no limit.")] = 0,
) -> None:
    """Train every recipe with every seed, and print the table.

    A run whose outcome is in the folder is not repeated, so a command that reached its limit goes on where it stopped.
    """
    if unknown := sorted(set(only) - RECIPES.keys()):
        raise typer.BadParameter(f"There is no recipe {unknown[0]!r}; the recipes are: {'; '.join(RECIPES)}.")
    study = open_study(folder)
    study.train_missing(
        [RECIPES[name] for name in only or RECIPES], seed, time.monotonic() + (60 * minutes or math.inf)
    )
    print_outcomes(study, list(RECIPES.values()), seed)


@app.command()
def trial(
    folder: Folder,
    values: Annotated[list[str], typer.Option("--set", help="As in `gptloop train`. Repeatable, a trial each.")] = [],  # noqa: B006
    preset: str = "tinystories-53m-plus",
    generations: Annotated[int, typer.Option(min=1, help="The model of each teaches that of the next.")] = 1,
    seed: Seeds = [1],  # noqa: B006
) -> None:
    """Train with a preset, then with other values, and print the table, which compares each trial with the preset.

    A trial whose outcome is in the folder is not repeated.
    """
    study = open_study(folder)
    vocabulary_size = study.material.tokenizer.vocabulary_size
    chains = list[Recipe]()
    for each in ["", *values]:
        try:
            config = find_preset(preset).override(parse_overrides(each))
        except InvalidArgument as error:
            raise typer.BadParameter(str(error)) from None
        most = config.vocabulary_size
        if vocabulary_size > most or (config.tokenizer == "gpt2" and vocabulary_size != most):
            raise typer.BadParameter(
                f"The tokens in {folder} have a vocabulary of {vocabulary_size:,}, but the model would have one of "
                f"{most:,}: prepare another folder with --preset {preset}."
            )
        config = replace(config, vocabulary_size=vocabulary_size)
        chains += self_taught(each or preset, config, generations, chains[0] if chains else None)
    study.train_missing(chains, seed, math.inf)
    print_outcomes(study, chains, seed)


def open_study(folder: Path) -> Study:
    """Prepares the device, and opens the study in a folder."""
    accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")
    study = Study(folder)
    print(study.material, flush=True)
    return study


@app.command()
def table(folder: Folder, seed: Seeds = [1, 2, 3]) -> None:  # noqa: B006
    """Print the table of `steps` without training."""
    print_outcomes(Study(folder), list(RECIPES.values()), seed)


def print_outcomes(study: Study, recipes: Sequence[Recipe], seeds: Sequence[int]) -> None:
    """Prints a table of the recipes that have outcomes."""
    rows = []
    for recipe in recipes:
        if outcomes := study.outcomes(recipe, seeds):
            earlier = study.outcomes(recipe.against, seeds) if recipe.against else {}
            best = [outcome.best for outcome in outcomes.values()]
            gains = [outcomes[seed].best[0] - earlier[seed].best[0] for seed in outcomes if seed in earlier]
            rows.append(
                [
                    recipe.name,
                    f"{statistics.mean(loss for loss, _ in best):.4f}",
                    str(len(best)),
                    _with_interval(gains),
                    f"{statistics.mean(step for _, step in best):,.0f}",
                    f"{statistics.mean(outcome.seconds for outcome in outcomes.values()):.0f} s",
                    format_size(max(outcome.peak_bytes for outcome in outcomes.values())),
                ]
            )
    print_table(["recipe", "held-out loss", "seeds", "difference", "best at step", "time", "memory"], rows)


@app.command()
def resume(folder: Folder, steps: int = 400) -> None:
    """Train twice from one seed, and once with a save and a restore halfway; print the differences at the ends."""
    accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")
    from shared.gpt.model import parameters_of
    from trainer_service.training.evaluate import EvaluationSet, evaluate
    from trainer_service.training.trainer import Trainer

    material = Material.load(folder)
    windows = _held_out(material.held_out, CLASSIC.context_length)[:64]
    config = replace(CLASSIC, max_steps=steps, warmup_steps=steps // 8)
    text = TrainingText(material.train, material.tokenizer.end_token)

    def trained(trainer: Trainer, until: int) -> Trainer:
        while trainer.step < until:
            trainer.take_step()
        return trainer

    def weights(trainer: Trainer) -> dict[str, np.ndarray]:
        return {name: np.array(array) for name, array in parameters_of(trainer.model).items()}

    first, second = (trained(Trainer(config, text), steps) for _ in range(2))
    half = trained(Trainer(config, text), steps // 2)
    resumed = Trainer(config, text)
    with TemporaryDirectory() as state:
        half.save(Path(state))
        resumed.restore(Path(state))
    pairs = {"again": (first, second), "restored": (half, resumed), "resumed": (first, resumed)}
    rows = []
    for name, (one, other) in pairs.items():
        if name == "resumed":
            trained(other, steps)
        here, there = weights(one), weights(other)
        apart = max(float(np.abs(here[each] - there[each]).max()) for each in here)
        losses = [evaluate(each.model, EvaluationSet(windows, 1, ""), 32, each.workers) for each in (one, other)]
        nats = losses[1].nats_per_token - losses[0].nats_per_token
        rows.append([name, f"{one.step}", f"{apart:.1e}", f"{losses[0].nats_per_token:.6f}", f"{nats:+.6f}"])
    print_table(["run", "step", "largest weight difference", "held-out loss", "loss difference"], rows)


def with_gptloop(recipe: Recipe, seed: int, material: Material, path: Path, teacher: Path | None) -> Outcome:
    """Trains with this project, and writes the best weights to a file."""
    import mlx.core as mx

    from shared.gpt.weights import load_model, save_model
    from tests.benchmarks.former import former
    from trainer_service.training.evaluate import EvaluationSet, evaluate
    from trainer_service.training.trainer import Trainer

    config = replace(recipe.config, seed=seed)
    evaluation_set = EvaluationSet(_held_out(material.held_out, config.context_length), 1, "")
    text = TrainingText(material.train, material.tokenizer.end_token)
    peaks = []

    def held_out_loss() -> float:
        peaks.append(mx.get_peak_memory())
        loss = evaluate(trainer.model, evaluation_set, 32, trainer.workers).nats_per_token
        if all(loss < earlier for _, earlier in learning.losses):
            save_model(trainer.model, path)
        mx.reset_peak_memory()
        return loss

    mx.clear_cache()
    mx.reset_peak_memory()
    with former(windows_anywhere=recipe.windows_anywhere, attention_without_dropout=recipe.attention_without_dropout):
        trainer = Trainer(config, text, teachers=[load_model(teacher, config.gpt)] if teacher else [])
        learning = Learning(config.evaluation_interval, held_out_loss, lambda: mx.eval(trainer.model.parameters()))
        trainer.take_step()
        while learning.goes_on(trainer.step, config.max_steps):
            trainer.take_step()
    return Outcome(learning.losses, learning.seconds, max(peaks))


def with_pytorch(recipe: Recipe, seed: int, material: Material) -> Outcome:
    """Trains with PyTorch on the same batches; the peak memory is 0 on a CPU."""
    import torch

    from tests.benchmarks.peers.pytorch import GPT, make_optimizer

    config = replace(recipe.config, seed=seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    values: dict[str, Any] = config.to_dict()
    padded = -(-config.vocabulary_size // 64) * 64
    model = GPT(values, padded).to(device)
    optimizer = make_optimizer(model, values)
    compiled = torch.compile(model.loss)
    windows = _held_out(material.held_out, config.context_length)
    text = TrainingText(material.train, material.tokenizer.end_token)
    batches = Batches(text, seed=config.seed, rows=config.batch_size, context_length=config.context_length)

    def tensor(tokens: np.ndarray) -> Any:
        return torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def held_out_loss() -> float:
        model.eval()
        losses = []
        for start in range(0, len(windows), 32):
            some = tensor(windows[start : start + 32])
            logits = model(some[:, :-1])[..., : config.vocabulary_size]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten()).item())
        model.train()
        sizes = [len(windows[start : start + 32]) for start in range(0, len(windows), 32)]
        return float(np.average(losses, weights=sizes))

    def take_step(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        drawn = batches.at(step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = compiled(tensor(drawn.inputs), tensor(drawn.targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    learning = Learning(config.evaluation_interval, held_out_loss, wait)
    step = 0
    take_step(step)
    while learning.goes_on(step + 1, config.max_steps):
        step += 1
        take_step(step)
    peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Outcome(learning.losses, learning.seconds, peak_bytes)


def _held_out(tokens: Tokens, context_length: int) -> Tokens:
    """Returns the held-out text in adjacent windows (N, T+1)."""
    starts = np.arange((tokens.size - 1) // context_length) * context_length
    windows: Tokens = tokens[starts[:, None] + np.arange(context_length + 1)]
    return windows


def _with_interval(differences: list[float]) -> str:
    """Returns the mean of some differences, with the 95 % interval of Student's t."""
    if len(differences) not in _T:
        return "" if not differences else f"{statistics.mean(differences):+.4f}"
    half = _T[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.4f} ± {half:.4f}"


if __name__ == "__main__":
    app()
