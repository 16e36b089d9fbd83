"""Runs real make with real commands in a folder that imitates a fresh checkout."""

import re
from pathlib import Path

import pytest

from shared.errors import shown
from tests.pages import BLOCKS, TEXT
from tests.workplace import Workplace
from trainer_service.presets import PRESETS

pytestmark = pytest.mark.slow


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "PRSET=small"], "PRSET is not a variable of `make train`; did you mean PRESET?"),
        (["train", "preset=small"], "preset is not a variable of `make train`; did you mean PRESET?"),
        (["up", "PRESET=small"], "PRESET is not a variable of `make up`, which takes none."),
        (["demo", "DRY_RUN=1"], "DRY_RUN is not a variable of `make demo`, which takes none."),
        (["export", "DIR=x"], "VERSION= is missing."),
        (["export", "VERSION=1"], "DIR= is missing."),
        (["watch"], "JOB= is missing."),
        (["prune", "DRY_RUN=maybe"], "DRY_RUN is 'maybe', but must be 1, 0, yes, no, true or false."),
        (["generate", "PROMPT=a", "TOP_K=few"], "TOP_K is 'few', but must be a whole number."),
        (["generate", "PROMPT=a", "SEED=-1"], "SEED is '-1', but must be greater than or equal to 0."),
        (["train", "GPTLOOP_VRA=x"], "GPTLOOP_VRA is not a setting; did you mean GPTLOOP_VAR?"),
        (
            ["up", "GPTLOOP_COLOUR=red"],
            "GPTLOOP_COLOUR is not a setting; the README of each service lists its settings.",
        ),
        (["train", "PRESET=smal"], f"Unknown preset 'smal'. Did you mean small? The presets are {', '.join(PRESETS)}."),
    ],
)
def test_wrong_words_are_refused_by_name(workplace: Workplace, words: list[str], sentence: str) -> None:
    assert workplace.refusal(*words) == f"error: {sentence}"


def test_a_variable_of_another_target_is_refused_with_those_that_the_target_takes(workplace: Workplace) -> None:
    error = workplace.refusal("generate", "DRY_RUN=1")
    assert "DRY_RUN is not a variable of `make generate`, which takes PROMPT, PROMPTS," in error and "TOP_K" in error
    assert "FAST is not a variable of `make lock`" in workplace.refusal("lock", "FAST=1")


@pytest.mark.parametrize("words", [["jbos"], ["prune", "small"]])
def test_a_word_that_is_not_a_target_is_refused_before_anything_runs(workplace: Workplace, words: list[str]) -> None:
    ended = workplace.make(*words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f'There is no target "{words[-1]}": `make help` lists' in ended.stderr


def test_variables_of_the_environment_do_not_count(workplace: Workplace) -> None:
    ended = workplace.make("prune", DRY_RUN="maybe", VERSION="7", PRSET="x")
    assert ended.returncode == 0 and ended.stdout == "Nothing to prune: the registry holds no version and no state.\n"


def test_settings_may_stand_on_the_command_line(workplace: Workplace) -> None:
    (workplace.folder / "file").touch()
    assert "GPTLOOP_VAR is" in workplace.refusal("checkpoints", "GPTLOOP_VAR=file")


@pytest.mark.parametrize("value", ["--help", 'it\'s "quoted"', "$HOME $(HOME) `id`", "two\nlines", "#no comment"])
def test_a_value_arrives_as_it_was_typed(workplace: Workplace, value: str) -> None:
    assert shown(value) in workplace.refusal("train", f"PRESET={value}")


def test_every_make_line_on_the_pages_is_understood(workplace: Workplace) -> None:
    fenced = "".join(text for language, text in BLOCKS if language == "sh")
    lines = re.findall(r"^make .*$", fenced, re.MULTILINE) + re.findall(r"`(make [^`\n]+)`", TEXT)
    assert len(lines) > 30
    for line in {line.replace("<", "").replace(">", "") for line in lines} - {"make ACCELERATOR=cuda"}:
        ended = workplace.run("bash", "-c", line.replace("make", "make -n", 1), AFTER="1")
        assert ended.returncode == 0 or "cuda" in line, (line, ended.stderr)
