"""The study of recipes, with tiny models."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.gpt.tokenizer import train_bpe
from tests.benchmarks import learn
from tests.benchmarks.former import former
from tests.benchmarks.recipes import RECIPES, Recipe
from tests.trainer_service.training.tiny_runs import TEXT, tiny
from trainer_service.training import trainer as trainer_module
from trainer_service.training.trainer import Trainer

TINY = tiny(max_steps=6, evaluation_interval=2, dropout=0.5, distillation_alpha=0.5)
FORMER = Recipe("former", TINY, windows_anywhere=True, attention_without_dropout=True)
NEW = Recipe("new", TINY, against="former")
TAUGHT = Recipe("taught", TINY, against="new", teacher="new")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(RECIPES):
        monkeypatch.delitem(RECIPES, name)
    for recipe in (FORMER, NEW, TAUGHT):
        monkeypatch.setitem(RECIPES, recipe.name, recipe)
    train_bpe(["Once upon a time. " * 9], 300).save(tmp_path / "tokenizer.json")
    np.save(tmp_path / "train.npy", TEXT.tokens)
    np.save(tmp_path / "held_out.npy", TEXT.tokens[::-1][:200])
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
    outcomes = {recipe.name: learn.Study(folder).outcomes(recipe) for recipe in (FORMER, NEW, TAUGHT)}
    assert all(set(each) == {1, 2} for each in outcomes.values())
    assert all([step for step, _ in each[1].losses] == [2, 4, 6] for each in outcomes.values())
    losses = [str(each[1].losses) for each in outcomes.values()]
    assert len(set(losses)) == 3
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
    assert learn.Study(folder).outcomes(NEW)
    assert not learn.Study(folder).outcomes(replace(NEW, config=replace(TINY, dropout=0.4)))


def test_a_run_ends_when_it_has_been_worse_twice() -> None:
    losses = iter([2.0, 2.06, 2.0, 2.06, 2.07, 1.0])
    learning = learn.Learning(10, lambda: next(losses), lambda: None)
    assert next(step for step in range(1, 101) if not learning.goes_on(step, 100)) == 50
    assert learning.losses[:2] == [(10, 2.0), (20, 2.06)]


@pytest.mark.parametrize("part", ["windows_anywhere", "attention_without_dropout"])
def test_a_former_form_changes_what_a_run_learns_and_only_inside(part: str) -> None:
    def loss() -> float:
        return trainer_module.scalar(Trainer(TINY, TEXT).take_step().loss)

    new = loss()
    with former(**{"windows_anywhere": False, "attention_without_dropout": False} | {part: True}):
        assert loss() != new
    assert loss() == new
