"""The study of recipes, with tiny models."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.gpt.tokenizer import train_bpe
from tests.benchmarks import learn
from tests.benchmarks.former import former
from tests.benchmarks.recipes import RECIPES, Recipe
from tests.trainer_service.training.tiny_runs import TEXT, tiny
from trainer_service.presets import PRESETS
from trainer_service.training import trainer as trainer_module
from trainer_service.training.trainer import Trainer

TINY = tiny(max_steps=6, evaluation_interval=2, dropout=0.5, distillation_alpha=0.5)
FORMER = Recipe("former", TINY, windows_anywhere=True, attention_without_dropout=True)
NEW = Recipe("new", TINY, against=FORMER)
TAUGHT = Recipe("taught", TINY, against=NEW, teacher=NEW)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(RECIPES):
        monkeypatch.delitem(RECIPES, name)
    for recipe in (FORMER, NEW, TAUGHT):
        monkeypatch.setitem(RECIPES, recipe.name, recipe)
    tokenizer = train_bpe(["Once upon a time. " * 9], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    tokens = TEXT.tokens % tokenizer.vocabulary_size
    np.save(tmp_path / "train.npy", tokens)
    np.save(tmp_path / "held_out.npy", tokens[::-1][:200])
    return tmp_path


def test_a_study_trains_each_recipe_once_and_its_teacher_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = learn.Study(folder)
    for seed in (1, 2):
        study.train(FORMER, seed)
        study.train(TAUGHT, seed)
    told = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"{name}, seed {seed}" for seed in (1, 2) for name in ("former", "new", "taught")]
    outcomes = [learn.Study(folder).outcomes(recipe, [1, 2, 3]) for recipe in (FORMER, NEW, TAUGHT)]
    assert all(set(each) == {1, 2} for each in outcomes)
    assert all([step for step, _ in each[1].losses] == [2, 4, 6] for each in outcomes)
    assert len({str(each[1].losses) for each in outcomes}) == 3
    learn.table(folder)
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 and "±" in rows[1] and "±" not in rows[0]


def test_a_study_goes_on_where_it_stopped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = learn.Study(folder)
    study.train_missing([FORMER], [1], until_s=math.inf)
    study.train_missing([FORMER, NEW], [1, 2], until_s=math.inf)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["former, seed 1", "new, seed 1", "former, seed 2", "new, seed 2"]
    study.train_missing([FORMER, NEW, TAUGHT], [1, 2], until_s=0)
    assert not capsys.readouterr().out


def test_an_outcome_of_other_values_does_not_count(folder: Path) -> None:
    learn.Study(folder).train(NEW, 1)
    assert learn.Study(folder).outcome(NEW, 1)
    assert learn.Study(folder).outcome(replace(NEW, config=replace(TINY, dropout=0.4)), 1) is None


def test_trials_are_compared_with_the_preset_and_have_generations_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    # The tests have prepared the device.
    monkeypatch.setattr("shared.device.accelerator.prepare", lambda *_, **__: None)
    run = partial(CliRunner().invoke, learn.app, catch_exceptions=False)
    done = run(["trial", str(folder), "--preset", "tiny", "--set", "dropout=0.4", "--generations", "2"])
    rows = [line.split("|")[1:5] for line in done.output.splitlines() if line.startswith("|")][2:]
    names, losses, _, gains = zip(*([cell.strip() for cell in row] for row in rows), strict=True)
    assert names == ("tiny", "tiny, generation 2", "dropout=0.4", "dropout=0.4, generation 2")
    assert len(set(losses)) == 4
    assert [gain != "" for gain in gains] == [False, True, True, True]
    assert float(gains[2]) == pytest.approx(float(losses[2]) - float(losses[0]), abs=2e-4)
    for preset, value, sentence in (
        ("tiny", "vocabulary_size=269", "prepare another folder"),
        ("tinystories-53m", "max_steps=1", "prepare another folder"),
        ("tiny", "droput=0.4", "Did you mean dropout?"),
    ):
        refused = run(["trial", str(folder), "--preset", preset, "--set", value])
        said = " ".join(refused.output.replace("│", " ").split())
        assert refused.exit_code == 2 and sentence in said


def test_a_run_ends_when_it_has_been_worse_twice() -> None:
    losses = iter([2.0, 2.06, 2.0, 2.06, 2.07, 1.0])
    learning = learn.Learning(10, lambda: next(losses), lambda: None)
    assert next(step for step in range(1, 101) if not learning.goes_on(step, 100)) == 50
    assert learning.losses[:2] == [(10, 2.0), (20, 2.06)]


@pytest.mark.parametrize("part", ["windows_anywhere", "attention_without_dropout"])
def test_a_former_form_changes_what_a_run_learns_and_only_inside(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In MLX inside and outside, on a CPU too.
    monkeypatch.setattr(trainer_module, "on_cpu", lambda: False)

    def loss() -> float:
        return trainer_module.scalar(Trainer(TINY, TEXT).take_step().loss)

    new = loss()
    with former(**{"windows_anywhere": False, "attention_without_dropout": False} | {part: True}):
        assert loss() != new
    assert loss() == new
