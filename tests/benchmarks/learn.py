"""Compares the held-out loss with PyTorch: both train the classic recipe on real stories with several seeds.

python -m tests.benchmarks.learn prepare --help, then python -m tests.benchmarks.learn run --help, or resume --help
"""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from shared.device import accelerator
from tests.benchmarks.side_by_side import ROOT, print_table
from trainer_service.presets import PRESETS
from trainer_service.training.batches import Batches, Tokens, TrainingText
from trainer_service.training.config import TrainingConfig

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

# 53M parameters, untied head, dropout 0.1, 12 x 512 tokens, 3e-4 after 2000 steps of warm-up, a cosine to a tenth.
RECIPE = PRESETS["tinystories-53m"]
# GPT-2's tokenizer has it last.
END_TOKEN = RECIPE.vocabulary_size - 1
Folder = Annotated[Path, typer.Argument(help="Folder of the tokens.")]


@app.command()
def prepare(
    folder: Folder,
    dataset: Annotated[list[str], typer.Option(help="Files of training text. Repeatable.")],
    validation: Annotated[list[str], typer.Option(help="Files of held-out text. Repeatable.")],
) -> None:
    """Tokenise all of the text with GPT-2's tokenizer into two files."""
    from trainer_service.text.corpus import DatasetSpec
    from trainer_service.text.tokens import prepare

    config = replace(RECIPE, max_train_tokens=10**9, max_validation_tokens=10**9)
    data = prepare(DatasetSpec(tuple(dataset), tuple(validation)), config, folder, lambda *_: None)
    np.save(folder / "train.npy", data.train)
    np.save(folder / "validation.npy", data.validation)
    print(f"{data.train.size:,} training and {data.validation.size:,} held-out tokens")


@app.command()
def run(folder: Folder, seeds: int = 2, steps: int = 8000, interval: int = 250) -> None:
    """Train with both implementations in turn; print the best held-out loss of each run in nats per token."""
    accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks", own_threads=True)
    train, held_out = (np.load(folder / name) for name in ("train.npy", "validation.npy"))
    count = (held_out.size - 1) // RECIPE.context_length
    windows = np.stack([held_out[start : start + RECIPE.context_length + 1] for start in range(0, count * 512, 512)])
    rows: list[list[str]] = []
    best: dict[str, list[float]] = {}
    for implementation in (with_gptloop, with_pytorch):
        for seed in range(1, seeds + 1):
            config = replace(RECIPE, max_steps=steps, warmup_steps=min(2000, steps // 4), seed=seed)
            start_s = time.perf_counter()
            losses = implementation(config, train, windows, interval)
            seconds = time.perf_counter() - start_s
            step, loss = min(losses, key=lambda each: each[1])
            best.setdefault(implementation.__name__, []).append(loss)
            print(implementation.__name__, seed, " ".join(f"{at}:{value:.4f}" for at, value in losses), flush=True)
            rows.append([implementation.__name__[5:], str(seed), f"{loss:.4f}", str(step), f"{seconds:.0f} s"])
    print_table(["implementation", "seed", "best held-out loss", "at step", "time"], rows)
    ours, theirs = (sum(losses) / seeds for losses in best.values())
    print(f"mean of the best: {ours:.4f} here, {theirs:.4f} in PyTorch, difference {ours - theirs:+.4f} nats")


@app.command()
def resume(folder: Folder, steps: int = 400) -> None:
    """Train twice from one seed, and once with a save and a restore halfway; print the differences at the ends."""
    accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks", own_threads=True)
    from shared.gpt.model import parameters_of
    from trainer_service.training.evaluate import EvaluationSet, evaluate
    from trainer_service.training.trainer import Trainer

    train, held_out = (np.load(folder / name) for name in ("train.npy", "validation.npy"))
    length = RECIPE.context_length
    windows = np.stack([held_out[start : start + length + 1] for start in range(0, 64 * length, length)])
    config = replace(RECIPE, max_steps=steps, warmup_steps=steps // 8)
    text = TrainingText(train, END_TOKEN)

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


def with_gptloop(config: TrainingConfig, train: Tokens, windows: Tokens, interval: int) -> list[tuple[int, float]]:
    from trainer_service.training.evaluate import EvaluationSet, evaluate
    from trainer_service.training.trainer import Trainer

    trainer = Trainer(config, TrainingText(train, END_TOKEN))
    evaluation_set = EvaluationSet(windows, 1, "")
    losses = []
    while trainer.step < config.max_steps:
        trainer.take_step()
        if trainer.step % interval == 0:
            loss = evaluate(trainer.model, evaluation_set, 32, trainer.workers).nats_per_token
            losses.append((trainer.step, loss))
    return losses


def with_pytorch(config: TrainingConfig, train: Tokens, windows: Tokens, interval: int) -> list[tuple[int, float]]:
    import torch

    from tests.benchmarks.peers.pytorch import GPT, make_optimizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    values: dict[str, Any] = config.to_dict()
    padded = -(-config.vocabulary_size // 64) * 64
    model = GPT(values, padded).to(device)
    optimizer = make_optimizer(model, values)
    compiled = torch.compile(model.loss)

    def tensor(tokens: np.ndarray) -> Any:
        return torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def held_out() -> float:
        model.eval()
        losses = []
        for start in range(0, len(windows), 32):
            some = tensor(windows[start : start + 32])
            logits = model(some[:, :-1])[..., : config.vocabulary_size]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten()).item())
        model.train()
        sizes = [len(windows[start : start + 32]) for start in range(0, len(windows), 32)]
        return float(np.average(losses, weights=sizes))

    text, rows, length = TrainingText(train, END_TOKEN), config.batch_size, config.context_length
    batches = Batches(text, seed=config.seed, rows=rows, context_length=length)
    results = []
    for step in range(config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        drawn = batches.at(step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = compiled(tensor(drawn.inputs), tensor(drawn.targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % interval == 0:
            results.append((step + 1, held_out()))
    return results


if __name__ == "__main__":
    app()
