from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from shared.errors import GptloopError, InvalidArgument, NotFound, Unavailable
from shared.gpt.config import count_parameters
from shared.registry.retention import Retention
from shared.service import cli
from shared.text import format_size
from tests.trainer_service.sweep.sweeps import Played
from trainer_service.commands.sweep import _plan, _winner, app, parse_share
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest
from trainer_service.plan import Machine
from trainer_service.sweep.results import results

PAIR = ["--try", "learning_rate=1e-3,3e-3"]


@pytest.fixture(autouse=True)
def _no_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is refused may reach the queue."""
    monkeypatch.setenv("GPTLOOP_VAR", str(tmp_path))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        ([], InvalidArgument, "--try is missing."),
        (["--try", "dropout=0,2"], InvalidArgument, "Candidate 2 (dropout=2): "),
        ([*PAIR, "--preset", "smal"], InvalidArgument, "Did you mean small?"),
        ([*PAIR, "--set", "max_steps"], InvalidArgument, "is not of the form name=value"),
        ([*PAIR, "--rungs", "0"], InvalidArgument, "--rungs is '0', but must be"),
        ([*PAIR, "--rungs", "9"], InvalidArgument, "9 rungs do not fit: their steps would be 64, 64,"),
        ([*PAIR, "--keep", "3"], InvalidArgument, "--keep is '3', but must be a share from 1/100 to 9/10, as in 1/3."),
        ([*PAIR, "--name", "a b"], InvalidArgument, "The name of a run is 'a b-1', but must have"),
        ([*PAIR, "--dataset", "absent.txt"], NotFound, "absent.txt"),
        ([*PAIR, "--needs", "tpu"], InvalidArgument, "needs is 'tpu', but must be gpu"),
        (PAIR, Unavailable, "Redis"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(
    words: list[str], kind: type[GptloopError], sentence: str
) -> None:
    with pytest.raises(kind) as refused:
        cli.invoke(app, words)
    assert sentence in str(refused.value)
    assert len(str(refused.value)) <= 400


@pytest.mark.parametrize(("text", "share"), [("1/3", Fraction(1, 3)), ("0.5", Fraction(1, 2)), (".9", Fraction(9, 10))])
def test_a_share_is_a_fraction_or_a_decimal_number(text: str, share: Fraction) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize(
    "text", ["", "a", "0", "1", "1/0", "-1/3", "nan", "inf", "1e-9", "1e99999999", "1E-9999999", "1/3333333333", "½"]
)
def test_what_is_not_a_share_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="but must be a share from 1/100 to 9/10"):
        parse_share(text)


def plan_of(played: Played, retention: Retention | None = None) -> list[str]:
    return list(_plan(played.sweep(), played.queue, played.registry, retention or Retention()))


def test_the_plan_says_what_a_sweep_will_take(queue: JobQueue, tmp_path: Path) -> None:
    lines = plan_of(Played(queue, tmp_path))
    assert lines[:5] == [
        "sweep try: 4 candidates, the runs try-1 to try-4",
        "rung 1      step 10: 4 candidates",
        "rung 2      step 20: 2 candidates",
        "rung 3      step 40, the end of the schedule: 1 candidate",
        "steps       80, instead of 160 without rungs",
    ]
    assert [line.split()[0] for line in lines[5:]] == ["time", "disk", "note:"]
    assert lines[-1].startswith("note: Rung 1 comes so soon after the warm-up, which ends at step 20, that")
    warm = Played(queue, tmp_path, overrides={"warmup_steps": "3"})
    assert not any("warm-up" in line for line in plan_of(warm))


def test_the_plan_takes_the_time_of_all_candidates(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "here", lambda: Machine(8 << 30, 2))

    def time(tried: str) -> str:
        (line,) = (line for line in plan_of(Played(queue, tmp_path, tried)) if line.startswith("time"))
        return line

    small, large = time("layers=1 seed=1,2"), time("layers=16 seed=1,2")
    assert time("layers=1,16") == time("layers=16,1") not in (small, large)


def test_the_plan_counts_the_last_states_the_best_version_and_its_state(queue: JobQueue, tmp_path: Path) -> None:
    retention = Retention(states=3)
    played = Played(queue, tmp_path, overrides={"optimizer": "adamw"})
    parameters = count_parameters(played.sweep().members[0].spec.config.gpt).total
    # Of each of 4 candidates 4 states of weights and two moments, and the weights of a version, with 4 bytes a number.
    size = format_size(4 * 4 * (4 * 3 + 1) * parameters)
    line = f"disk        up to {size} for the states and best versions of all candidates"
    assert line in plan_of(played, retention)
    assert line not in plan_of(replace(played, overrides={"optimizer": "muon"}), retention)


def test_a_winner_that_ended_before_the_schedule_says_so(queue: JobQueue, tmp_path: Path) -> None:
    played = Played(queue, tmp_path, tried="seed=1,2")
    sweep = played.sweep()
    sweep.begin()
    for number, loss in ((1, 2.0), (2, 3.0)):
        played.train(number, loss)
    sweep.turn()
    best = results(sweep, sweep.jobs(), played.registry)[0]
    played.end(1, JobState.FAILED, "It diverged.")
    first, note, *_ = _winner(best, TrainRequest(), sweep.halving)
    assert first == "Candidate 1 is the best: seed=1, held-out loss 2.0000 nats per token at step 10."
    assert note.startswith("note: No candidate came to the end of the schedule, step 40:")
    whole = replace(best, rungs={40: 1.0})
    assert not any(line.startswith("note:") for line in _winner(whole, TrainRequest(), sweep.halving))
