"""A process of the benchmark of scaling. It writes what it has measured as a line of JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from shared.device import accelerator
from tests.benchmarks.side_by_side import ROOT
from tests.benchmarks.worker import resident_peak

_ACCELERATOR = accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from trainer_service.training.batches import TrainingText  # noqa: E402
from trainer_service.training.config import TrainingConfig  # noqa: E402
from trainer_service.training.ranks import Ranks, Tree  # noqa: E402
from trainer_service.training.trainer import Trainer, scalar  # noqa: E402
from trainer_service.training.workers import Workers  # noqa: E402


class InPieces(Ranks):
    """Sums the gradients in pieces of at least some bytes on a stream of their own, so that a piece can travel while
    the rest is computed; in fp32, or in the types that they have."""

    def __init__(self, rank: int, count: int, size_bytes: int, narrow: bool = False) -> None:
        super().__init__(rank, count)
        self._size_bytes, self._narrow = size_bytes, narrow
        self._stream = mx.new_stream(mx.default_device())

    def sum(self, loss: mx.array, gradients: Tree, flag: mx.array) -> tuple[mx.array, Tree, mx.array]:
        named = dict(tree_flatten(gradients))
        # The backward pass yields the gradients of the embeddings last, and before them those of the first layers.
        order = sorted(named, key=lambda name: ("embedding" not in name, name), reverse=True)
        summed: Tree = {}
        pending: list[str] = []
        for name in order:
            pending.append(name)
            kinds = {named[each].dtype for each in pending} if self._narrow else {mx.float32}
            if len(kinds) > 1 or sum(named[each].nbytes for each in pending) >= self._size_bytes:
                held = pending.pop() if len(kinds) > 1 and len(pending) > 1 else None
                summed |= self._piece({each: named[each] for each in pending})
                pending = [held] if held else []
        if pending:
            summed |= self._piece({each: named[each] for each in pending})
        scalars = mx.distributed.all_sum(mx.stack([loss, flag]), stream=self._stream)
        return scalars[0] * 1, tree_unflatten(list(summed.items())), scalars[1] * 1

    def _piece(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        with mx.stream(self._stream):
            flat = [each.reshape(-1) for each in arrays.values()]
            joined = mx.concatenate(flat if self._narrow else [each.astype(mx.float32) for each in flat])
            edges = np.cumsum([each.size for each in flat])[:-1].tolist()
            parts = mx.split(mx.distributed.all_sum(joined, stream=self._stream), edges)
        return {name: part.reshape(arrays[name].shape) for name, part in zip(arrays, parts, strict=True)}


def measure_training(
    config: TrainingConfig, ranks: Ranks, workers: Workers, what: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Measures the steps of a run on random tokens."""
    tokens = np.random.default_rng(1).integers(config.vocabulary_size, size=1_000_000, dtype=np.uint16)
    began_s = time.perf_counter()
    trainer = Trainer(config, TrainingText(tokens, end_token=0), workers, ranks=ranks)
    scalar(trainer.take_step().loss)
    first_step_s = time.perf_counter() - began_s
    _seconds(trainer, steps)
    mx.reset_peak_memory()
    times = [_seconds(trainer, steps) / steps for _ in range(rounds)]
    step_s = statistics.median(times)
    return {
        "batch_size": config.batch_size,
        "sum": what,
        "step_ms": step_s * 1e3,
        "tokens_per_s": config.tokens_per_step / step_s,
        "spread": (max(times) - min(times)) / step_s,
        "loss": scalar(trainer.take_step().loss),
        "peak_bytes": resident_peak() if _ACCELERATOR.backend == "cpu" else mx.get_peak_memory(),
        "first_step_s": first_step_s,
    }


def _seconds(trainer: Trainer, steps: int) -> float:
    start_s = time.perf_counter()
    for _ in range(steps):
        loss = trainer.take_step().loss
    mx.eval(loss, trainer.model.parameters(), trainer.optimizer.state)
    return time.perf_counter() - start_s


def measure_collectives(config: TrainingConfig, ranks: Ranks, rounds: int) -> list[dict[str, Any]]:
    """Measures ways to sum as many numbers as the model has, each twice in a round, and twice before."""
    text = TrainingText(np.zeros(2 * config.context_length, np.uint16), end_token=1)
    model = Trainer(config, text, ranks=ranks).model
    gradients = {
        name: array.astype(mx.bfloat16) if _ACCELERATOR.backend == "cuda" and "embedding" not in name else array
        for name, array in dict(tree_flatten(model.parameters())).items()
    }
    size = sum(array.size for array in gradients.values())
    wide = mx.random.normal((size,))
    narrow = wide.astype(mx.bfloat16)
    mx.eval(wide, narrow, gradients)
    one = mx.array(1.0)
    as_trained = mx.compile(lambda tree: ranks.sum(one, tree, one)[1])
    compiled = mx.compile(lambda array: mx.distributed.all_sum(array) * 1)
    measured: list[dict[str, Any]] = []

    def add(what: str, work: Callable[[], Any], size_bytes: int, before: Callable[[], object] = lambda: None) -> None:
        times_s = []
        for _ in range(2 + 2 * rounds):
            before()
            mx.eval(mx.distributed.all_sum(one))  # all ranks begin together
            start_s = time.perf_counter()
            mx.eval(work())
            times_s.append(time.perf_counter() - start_s)
        # The first two compile and fill the cache.
        middle, *ends = (f(times_s[2:]) * 1e3 for f in (statistics.median, min, max))
        row = {"what": what, "median_ms": middle, "least_ms": ends[0], "most_ms": ends[1]}
        measured.append(row | {"gb_per_s": size_bytes / middle / 1e6})

    all_sum = mx.distributed.all_sum
    add("fp32, one buffer", lambda: all_sum(wide), wide.nbytes)
    add("fp32, one buffer, no memory in MLX's cache", lambda: all_sum(wide), wide.nbytes, mx.clear_cache)
    add("fp32, one buffer, in place of a copy", lambda: all_sum(wide * 1), wide.nbytes)
    add("fp32, one buffer, compiled", lambda: compiled(wide), wide.nbytes)
    add("fp32, then one number read", lambda: mx.array(all_sum(wide)[:1].tolist()), wide.nbytes)
    from_host = mx.array(np.ones(size, np.float32))
    add("fp32, numbers from the host", lambda: all_sum(from_host), wide.nbytes)
    for piece in (16, 32, 64, 128):
        parts = [wide[start : start + (piece << 18)] * 1 for start in range(0, size, piece << 18)]
        mx.eval(parts)
        add(f"fp32, pieces of {piece} MiB", lambda parts=parts: [all_sum(part) for part in parts], wide.nbytes)  # type: ignore[misc]
    add("bf16, one buffer", lambda: all_sum(narrow), narrow.nbytes)
    add("as in a step: joined, fp32, divided", lambda: as_trained(gradients), wide.nbytes)
    own = mx.compile(InPieces(ranks.rank, ranks.count, 1 << 40, narrow=True).sum)
    own_bytes = sum(array.nbytes for array in gradients.values())
    add("the same in the types of the gradients", lambda: own(one, gradients, one)[1], own_bytes)
    add("each gradient by itself", lambda: [all_sum(each) for each in gradients.values()], own_bytes)
    return measured


def main() -> None:
    """Measures what the argument, JSON, asks for."""
    task = json.loads(sys.argv[1])
    if not task["cpu"] and _ACCELERATOR.backend != "cuda":
        sys.exit("There is no NVIDIA GPU here; use --cpu.")
    ranks = Ranks.join(60) if task["count"] > 1 else Ranks.alone()
    start_s = time.time() - task["started_s"]
    sums: dict[str, Ranks] = {"none" if ranks.count == 1 else "one buffer": ranks}
    if ranks.count > 1:
        sums["pieces of 32 MiB, own stream"] = InPieces(ranks.rank, ranks.count, 32 << 20)
        sums["the same, own types"] = InPieces(ranks.rank, ranks.count, 32 << 20, narrow=True)
    training = []
    with Workers(_ACCELERATOR.threads) as workers:
        for batch_size in task["batches"] if task["training"] else []:
            config = TrainingConfig.from_dict(task["config"] | {"batch_size": batch_size})
            for what, way in sums.items():
                training.append(measure_training(config, way, workers, what, task["rounds"], task["steps"]))
                accelerator.release_memory()
    config = TrainingConfig.from_dict(task["config"])
    collectives = measure_collectives(config, ranks, task["rounds"]) if ranks.count > 1 else []
    print(json.dumps({"start_s": start_s, "training": training, "collectives": collectives}), flush=True)


if __name__ == "__main__":
    main()
