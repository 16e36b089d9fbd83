"""mlx-lm's BatchGenerator in a Python loop, in this process and without gRPC."""

import json
import time
from collections import deque
from typing import Any

from shared.device import accelerator
from tests.benchmarks.side_by_side import ROOT
from tests.benchmarks.worker import resident_peak
from tests.mlx_on_cpu import speed_up_mlx

speed_up_mlx(ROOT / ".pytest_cache" / "benchmarks")
accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")

import mlx.core as mx  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models.gpt2 import Model, ModelArgs  # noqa: E402

from shared.gpt.weights import load_arrays  # noqa: E402
from tests.benchmarks.checkpoint import Checkpoint  # noqa: E402
from tests.benchmarks.closed_loop import ClosedLoop  # noqa: E402
from tests.benchmarks.player import Progress  # noqa: E402
from tests.benchmarks.recording import Recording, Stream  # noqa: E402
from tests.benchmarks.schedule import Schedule  # noqa: E402
from tests.benchmarks.setup import Setup  # noqa: E402
from trainer_service.huggingface.gpt2 import PREFIX  # noqa: E402


def load(checkpoint: Checkpoint) -> Any:
    """Loads the model. mlx-lm only supports names without a prefix and layers of four times the width."""
    settings = json.loads((checkpoint.exported / "config.json").read_bytes())
    assert settings["tie_word_embeddings"] and settings["n_inner"] == 4 * settings["n_embd"]
    model = Model(ModelArgs.from_dict(settings | {"n_ctx": settings["n_positions"]}))
    arrays = load_arrays(checkpoint.exported / "model.safetensors")
    weights = model.sanitize({name.removeprefix(PREFIX): array for name, array in arrays.items()})
    model.load_weights(list(weights.items()))
    model.eval()
    mx.eval(model.parameters())
    return model


class Serving:
    """Inserts requests when they are due, between two steps."""

    def __init__(self, setup: Setup) -> None:
        self._model, self._slots = load(setup.checkpoint), setup.slots

    def play(self, schedule: Schedule, progress: Progress) -> Recording:
        generator = BatchGenerator(self._model, completion_batch_size=self._slots)
        memory = [accelerator.memory().resident_bytes]
        waiting, streams = deque(schedule.arrivals), list[Stream]()
        running: dict[int, Stream] = {}
        begin = sampled = time.monotonic()
        while waiting or running:
            now = time.monotonic()
            if not running and begin + waiting[0].at_s > now:
                time.sleep(begin + waiting[0].at_s - now)
                now = time.monotonic()
            while waiting and begin + waiting[0].at_s <= now:
                arrival = waiting.popleft()
                (uid,) = generator.insert([list(arrival.prompt)], [arrival.output_tokens])
                running[uid] = Stream(arrival.at_s, now - begin)
                streams.append(running[uid])
            _, responses = generator.next()
            now = time.monotonic()
            for response in responses:
                running[response.uid].token_s.append(now - begin)
                if response.finish_reason is not None:
                    running.pop(response.uid).end_s = now - begin
                    progress.ended()
            late = [uid for uid, stream in running.items() if now - begin > stream.sent_s + schedule.limit_s]
            for uid in late:
                running[uid].end_s, running[uid].status = now - begin, "DEADLINE_EXCEEDED"
                del running[uid]
                progress.ended()
            if late:
                generator.remove(late)
            if now > sampled + 1.0:
                sampled = now
                memory.append(accelerator.memory().resident_bytes)
        generator.close()
        memory.append(accelerator.memory().resident_bytes)
        return Recording(streams, memory)


class Generation:
    """Generates for all rows at once."""

    def __init__(self, setup: dict[str, Any], work: dict[str, Any], variant: str) -> None:
        given = Setup.from_dict(setup)
        self._work = ClosedLoop(**work)
        self._generator = BatchGenerator(load(given.checkpoint), completion_batch_size=given.slots)
        self._prompts = self._work.prompts()

    def step(self) -> None:
        uids = self._generator.insert(next(self._prompts), [self._work.output_tokens] * self._work.rows)
        tokens = dict.fromkeys(uids, 0)
        while responses := self._generator.next_generated():
            for response in responses:
                tokens[response.uid] += 1
        self._work.check(list(tokens.values()))

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resident_peak()

    def end(self) -> None:
        self._generator.close()
