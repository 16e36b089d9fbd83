from pathlib import Path

import pytest

from shared.errors import GptloopError, InvalidArgument
from tests.registries import disk_registry
from trainer_service.jobs.requests import TrainRequest
from trainer_service.sweep.grid import Member, members, parse_tries


def of(tmp_path: Path, text: str, **overrides: str) -> list[Member]:
    common = TrainRequest(name="try", overrides={"max_steps": "9"} | overrides)
    return members(common, parse_tries(text), disk_registry(tmp_path / "registry"))


def test_each_combination_of_the_values_is_a_run_that_differs_in_nothing_else(tmp_path: Path) -> None:
    found = of(tmp_path, "learning_rate=1e-3,3e-3 dropout=0,0.1")
    assert [each.spec.run for each in found] == ["try-1", "try-2", "try-3", "try-4"]
    assert [(each.spec.config.learning_rate, each.spec.config.dropout) for each in found] == [
        *((0.001, 0.0), (0.001, 0.1)),
        *((0.003, 0.0), (0.003, 0.1)),
    ]
    assert found[2].text == "learning_rate=3e-3 dropout=0"
    assert found[2].spec.notes == "sweep try: learning_rate=3e-3 dropout=0"
    assert {(each.spec.config.seed, each.spec.config.max_steps) for each in found} == {(1337, 9)}


def test_a_shape_is_judged_with_the_values_of_all(tmp_path: Path) -> None:
    # The preset's width of 160 is no multiple of 7 heads.
    assert [each.spec.config.width for each in of(tmp_path, "width=70,140", heads="7")] == [70, 140]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate", "'learning_rate' is not of the form name=value,value, as in --try"),
        ("learning_rate=1e-3,,3e-3", "'learning_rate=1e-3,,3e-3' is not of the form"),
        ("=1,2", "'=1,2' is not of the form"),
        ("seed=1,2 seed=3,4", "'seed' is tried twice; list all of its values together, as in seed=1,2."),
        ("max_steps=10,20", "max_steps cannot be tried, because candidates are compared at the same steps"),
        (
            "vocabulary_size=300,400",
            "vocabulary_size cannot be tried, because losses on different held-out text do not",
        ),
        ("", "--try names 1 combination of values, but a sweep compares from 2 to 100."),
        ("seed=1", "--try names 1 combination of values"),
        ("seed=1,2,3,4,5,6,7,8,9,10,11 dropout=0,.1,.2,.3,.4,.5,.6,.7,.8,.9", "--try names 110 combinations of values"),
        ("dropout=0,1.5", "Candidate 2 (dropout=1.5): dropout is 1.5, but"),
        ("seed=1,x dropout=0,0.1", "Candidate 3 (seed=x dropout=0): seed is 'x', but must be a whole number."),
        ("rate=1,2", "Candidate 1 (rate=1): Unknown training value 'rate'."),
        ("seed=1,\x1b[31m", "Candidate 2 (seed="),
        (f"seed=1,{'9' * 5000}", "Candidate 2 (seed=999"),
        ("seed=1,2,01", "Candidates 1 (seed=1) and 3 (seed=01) are the same; name each value once."),
        ("batch_size=4,8", "'batch_size' stands in --try and in --set; leave it out of one of them."),
    ],
)
def test_what_makes_no_grid_is_refused_with_what_would(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        of(tmp_path, text, batch_size="2")
    assert str(refused.value).startswith(sentence)
    assert str(refused.value).isprintable() and len(str(refused.value)) <= 400


def test_a_name_that_is_too_long_for_the_runs_is_refused(tmp_path: Path) -> None:
    common = TrainRequest(name="n" * 63)
    with pytest.raises(GptloopError, match="but must have from 1 to 64 letters"):
        members(common, {"seed": ("1", "2")}, disk_registry(tmp_path / "registry"))
