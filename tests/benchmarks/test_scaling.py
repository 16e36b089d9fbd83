import json
import subprocess
import sys

import pytest

from tests.benchmarks.side_by_side import ROOT


@pytest.mark.slow
def test_two_processes_on_a_cpu_are_compared_with_one() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.scaling", "--cpu", "--preset", "demo"]
    small = ["--rows", "2", "--rounds", "1", "--steps", "1", "--limit-s", "600"]
    done = subprocess.run([*command, *small], capture_output=True, check=True, cwd=ROOT, text=True)
    *tables, last = done.stdout.splitlines()
    results = json.loads(last)
    assert [each["batch_size"] for each in results["1"]["training"]] == [2]
    together = results["2"]["training"]
    assert {each["batch_size"] for each in together} == {2, 4} and results["2"]["collectives"]
    # The batch of a step is the same for any number of processes, and for any way to sum the gradients.
    losses = [each["loss"] for each in (*results["1"]["training"], *together) if each["batch_size"] == 2]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-3)
    assert sum(line.startswith("|") for line in tables) > len(together)
