import pytest

from shared.errors import InvalidArgument
from shared.gpt.config import count_parameters
from trainer_service.presets import PRESETS, find_preset
from trainer_service.training.config import TrainingConfig


def test_the_presets_have_the_sizes_that_their_names_promise() -> None:
    sizes = {name: count_parameters(preset.gpt).total for name, preset in PRESETS.items()}
    assert sizes["tinystories-53m"] == 52_990_464
    assert sizes["gpt2-124m"] == 124_439_808
    assert 1_000_000 <= sizes["demo"] <= 2_000_000
    assert 9_000_000 <= sizes["small"] <= 11_000_000


def test_an_unknown_preset_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidArgument, match=r"'huge'.*demo, small, tinystories-53m, gpt2-124m"):
        find_preset("huge")


def test_every_value_can_be_overridden_as_text() -> None:
    for preset in PRESETS.values():
        values = {name: str(value) for name, value in preset.to_dict().items()}
        assert preset.override(values) == preset
    changed = find_preset("demo").override({"max_steps": "1_000", "tied_head": "false", "learning_rate": "1e-4"})
    assert (changed.max_steps, changed.tied_head, changed.learning_rate) == (1000, False, 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "5"}, "Unknown override 'steps'.*max_steps"),
        ({"max_steps": "five"}, "max_steps is 'five', but must be a whole number"),
        ({"max_steps": "0"}, "max_steps is 0"),
        ({"tied_head": "maybe"}, "true or false"),
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        ({"learning_rate": "2"}, "learning_rate is 2"),
        ({"heads": "3"}, "cannot be divided among 3 heads"),
        ({"dropout": "1"}, "dropout is 1"),
        ({"tokenizer": "words"}, "gpt2 or bpe"),
        ({"tokenizer": "gpt2"}, "50257"),
        ({"vocabulary_size": "100"}, "from 257 to 65536"),
        ({"validation_share": "1"}, "validation_share"),
        ({"seed": "-1"}, "seed is -1"),
        ({"seed": "4294967296"}, "from 0 to 4294967295"),
        ({"beta2": "1"}, "beta2"),
        ({"weight_decay": "inf"}, "weight_decay"),
    ],
)
def test_a_wrong_override_is_refused_by_name(values: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        find_preset("demo").override(values)


def test_a_configuration_survives_json() -> None:
    preset = find_preset("demo")
    assert TrainingConfig.from_dict(preset.to_dict()) == preset
    with pytest.raises(InvalidArgument, match="width"):
        TrainingConfig.from_dict({name: value for name, value in preset.to_dict().items() if name != "width"})
