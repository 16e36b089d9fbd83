"""CTranslate2 with its own loop over a whole batch, which neither streams nor accepts new requests."""

import json
from typing import Any

import ctranslate2

from tests.benchmarks.closed_loop import ClosedLoop
from tests.benchmarks.setup import Setup
from tests.benchmarks.worker import resident_peak


class Generation:
    """Generates for all rows at once. `variant` "" computes in fp32, "int8" with int8 weights."""

    def __init__(self, setup: dict[str, Any], work: dict[str, Any], variant: str) -> None:
        given = Setup.from_dict(setup)
        self._work = ClosedLoop(**work)
        converted = given.checkpoint.converted
        self._tokens = json.loads((converted / "vocabulary.json").read_bytes())
        self._generator = ctranslate2.Generator(
            str(converted), compute_type=variant or "float32", inter_threads=1, intra_threads=given.threads
        )
        self._prompts = self._work.prompts()

    def step(self) -> None:
        results = self._generator.generate_batch(
            [[self._tokens[token] for token in prompt] for prompt in next(self._prompts)],
            min_length=self._work.output_tokens,
            max_length=self._work.output_tokens,
            include_prompt_in_result=False,
        )
        self._work.check([len(result.sequences_ids[0]) for result in results])

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resident_peak()
