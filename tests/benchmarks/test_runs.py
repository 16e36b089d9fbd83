import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.material import Material
from tests.benchmarks.runs import OutOfTime, Run, Runs
from trainer_service.presets import find_preset
from trainer_service.text.stories import train_stories
from trainer_service.training.workers import Workers

CONFIG = replace(
    find_preset("demo"),
    vocabulary_size=300,
    layers=1,
    width=16,
    heads=2,
    hidden_width=32,
    context_length=16,
    batch_size=4,
    max_steps=6,
    warmup_steps=1,
    evaluation_interval=3,
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    stories = [story for story, _ in zip(train_stories(), range(80), strict=False)]
    path.write_text("<|endoftext|>".join(stories))
    values = {"validation_share": "0.5", "max_train_tokens": "3000"}
    return Material.prepare([str(path)], CONFIG.override(values), path.parent / "tokens")


def runs(material: Material, folder: Path, end_s: float = math.inf) -> Runs:
    return Runs(material, Workers(), folder, folder / "copy.json", end_s)


def test_prepared_text_is_the_same_after_it_was_carried_to_another_folder(material: Material, tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", material.train)
    np.save(tmp_path / "held_out.npy", material.held_out)
    material.tokenizer.save(tmp_path / "tokenizer.json")
    assert Material.load(tmp_path).digest == material.digest
    assert material.train.size == 3000
    assert (material.held_out == material.tokenizer.end_token).sum() == 40


def test_a_finished_run_is_not_repeated_and_keeps_its_weights(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Run("plain", CONFIG)
    taught = Run("taught", replace(CONFIG, seed=2), (plain,))
    first = runs(material, tmp_path).outcome(taught)
    assert "plain: step 6" in capsys.readouterr().out
    assert first.step in (3, 6)
    assert first.nats == pytest.approx(sum(first.unit_nats) / sum(first.unit_tokens))
    assert runs(material, tmp_path).outcome(taught) == first
    assert capsys.readouterr().out == ""
    assert (tmp_path / "copy.json").read_bytes() == (tmp_path / "outcomes.json").read_bytes()


def test_the_difference_of_a_run_from_itself_is_nothing(material: Material, tmp_path: Path) -> None:
    outcome = runs(material, tmp_path).outcome(Run("plain", CONFIG))
    difference, interval = outcome.difference_from(outcome)
    assert interval is not None
    assert (difference, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_a_run_that_reaches_the_limit_leaves_no_outcome(material: Material, tmp_path: Path) -> None:
    with pytest.raises(OutOfTime):
        runs(material, tmp_path, end_s=time.monotonic()).outcome(Run("plain", CONFIG))
    assert not (tmp_path / "outcomes.json").exists()


def test_other_values_and_other_teachers_make_another_run(material: Material) -> None:
    plain = Run("plain", CONFIG)
    others = [
        Run("plain", replace(CONFIG, seed=2)),
        Run("plain", CONFIG, (plain,)),
        Run("plain", CONFIG, (plain, plain)),
    ]
    assert len({run.key(material) for run in (plain, *others)}) == 4
    assert Run("renamed", CONFIG).key(material) == plain.key(material)
    sharper = replace(CONFIG, distillation_alpha=0.9)
    assert Run("plain", sharper).key(material) == plain.key(material)
    assert Run("taught", sharper, (plain,)).key(material) != Run("taught", CONFIG, (plain,)).key(material)
