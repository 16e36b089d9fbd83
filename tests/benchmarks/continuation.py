"""Measures the held-out loss before and after a run continues on a changed schedule, for several peak rates.

python -m tests.benchmarks.continuation --help
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from shared.device import accelerator
from tests.benchmarks.side_by_side import ROOT, print_table
from trainer_service.presets import find_preset
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.config import TrainingConfig

app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def measure(
    preset: str = "demo",
    dataset: Annotated[str, typer.Option(help="As in `make train`.")] = "builtin",
    longer: Annotated[float, typer.Option(help="The new end, as a multiple of the preset's.")] = 2.0,
    interval: Annotated[int, typer.Option(help="Steps between evaluations.")] = 40,
    peak: Annotated[
        list[float] | None, typer.Option(help="Peaks beside the default's, as shares of the first one. Repeatable.")
    ] = None,
) -> None:
    """Train a preset to its end, then continue it to a later end, with the default peak rate and with others."""
    device = accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")
    from trainer_service.text.tokens import prepare
    from trainer_service.training.batches import TrainingText
    from trainer_service.training.evaluate import EvaluationSet, evaluate
    from trainer_service.training.trainer import Trainer
    from trainer_service.training.workers import Workers

    begun = find_preset(preset)
    end = round(begun.max_steps * longer)
    changed = replace(begun, max_steps=end)
    rows: list[list[str]] = []
    with TemporaryDirectory() as folder, Workers(device.threads) as workers:
        data = prepare(DatasetSpec((dataset,), ()), changed, Path(folder), lambda *_: None)
        held_out = EvaluationSet.from_tokens(
            data.validation,
            data.tokenizer,
            windows=begun.evaluation_windows,
            context_length=begun.context_length,
        )

        def losses(trainer: Trainer) -> list[tuple[int, float]]:
            found = []
            while trainer.step < trainer.config.max_steps:
                trainer.take_step()
                if trainer.step % interval == 0 or trainer.step == trainer.config.max_steps:
                    loss = evaluate(trainer.model, held_out, begun.batch_size, workers).nats_per_token
                    found.append((trainer.step, loss))
            print(" ".join(f"{step}:{loss:.4f}" for step, loss in found), flush=True)
            return found

        text = TrainingText(data.train, data.tokenizer.end_token)
        first = Trainer(begun, text, workers)
        before = losses(first)[-1][1]
        state = Path(folder) / "state"
        state.mkdir()
        first.save(state)
        for name, config in _continuations(begun, changed, peak or [1.0, 0.3, 0.1]):
            trainer = Trainer(config, text, workers)
            trainer.restore(state)
            found = losses(trainer)
            worst, last = max(loss for _, loss in found), found[-1][1]
            better = next((str(step) for step, loss in found if loss < before), "never")
            rate = f"{config.learning_rate:.1e}"
            final = f"{config.learning_rate * config.final_learning_rate_ratio:.1e}"
            rows.append([name, rate, final, f"{before:.4f}", f"{worst:.4f}", f"{last:.4f}", better])
    print_table(["continued with", "peak", "final rate", "before", "worst", f"at {end}", "better from step"], rows)


def _continuations(
    begun: TrainingConfig, changed: TrainingConfig, peaks: list[float]
) -> list[tuple[str, TrainingConfig]]:
    found = [("the default", changed.continuing(begun, begun.max_steps))]
    for share in peaks:
        config = replace(changed, learning_rate=begun.learning_rate * share)
        found.append((f"{share:g} of the peak", config.continuing(begun, begun.max_steps, {"learning_rate"})))
    return found


if __name__ == "__main__":
    app()
