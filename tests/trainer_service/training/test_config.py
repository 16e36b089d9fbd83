import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidArgument
from shared.gpt.config import count_parameters
from trainer_service.presets import PRESETS, find_preset
from trainer_service.training.config import TrainingConfig


@st.composite
def schedules(draw: st.DrawFn) -> TrainingConfig:
    """Draws any schedule, which starts at step 0 or later."""
    max_steps = draw(st.integers(1, 300))
    start = draw(st.integers(0, max_steps - 1))
    return replace(
        find_preset("demo"),
        schedule=draw(st.sampled_from(["cosine", "wsd"])),
        max_steps=max_steps,
        warmup_steps=draw(st.integers(0, 400)),
        learning_rate=draw(st.floats(1e-5, 1.0)),
        final_learning_rate_ratio=draw(st.floats(0.0, 1.0)),
        decay_ratio=draw(st.floats(0.001, 1.0)),
        schedule_start=start,
        schedule_start_ratio=draw(st.floats(0.0, 1.0)) if start else 0.0,
    )


def rates(config: TrainingConfig) -> list[float]:
    """Returns the rates of every step of a schedule and of its end, which has no step."""
    return [config.learning_rate_at(step) for step in range(config.schedule_start, config.max_steps + 1)]


def largest_change(config: TrainingConfig) -> float:
    """Returns the largest change of the rate in one step: the slope of the warm-up or of the decay. Half a cosine is at
    most pi / 2 times as steep as a line."""
    warmup_steps, decay_steps = config.warmup_end - config.schedule_start, config.max_steps - config.decay_start
    return config.learning_rate * max(1 / max(warmup_steps, 1), 1.5708 / decay_steps) + 1e-12


def test_presets_have_the_sizes_in_their_names() -> None:
    sizes = {name: count_parameters(preset.gpt).total for name, preset in PRESETS.items()}
    assert sizes["tinystories-53m"] == 52_990_464
    assert sizes["gpt2-124m"] == 124_439_808
    assert 1_000_000 <= sizes["demo"] <= 2_000_000
    assert 9_000_000 <= sizes["small"] <= 11_000_000


def test_the_error_for_an_unknown_preset_lists_all_presets() -> None:
    with pytest.raises(InvalidArgument, match=r"'huge'.*demo, small, tinystories-53m, tinystories-53m-plus, gpt2-124m"):
        find_preset("huge")


def test_every_value_can_be_overridden_by_text() -> None:
    for preset in PRESETS.values():
        values = {name: str(value) for name, value in preset.to_dict().items() if "schedule_start" not in name}
        assert preset.override(values) == preset
    changed = find_preset("demo").override({"max_steps": "1_000", "tied_head": "false", "learning_rate": "1e-4"})
    assert (changed.max_steps, changed.tied_head, changed.learning_rate) == (1000, False, 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "5"}, r"Unknown training value 'steps'\. Did you mean max_steps\?"),
        ({"q" * 500: "5"}, r"Unknown training value 'q+…q+'\. .*README.* lists all values\."),
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
        ({"schedule": "linear"}, "schedule is 'linear', but must be cosine or wsd"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', but must be adamw or muon"),
        ({"decay_ratio": "0"}, "decay_ratio is 0.0"),
        ({"decay_ratio": "1.1"}, "decay_ratio is 1.1"),
        ({"schedule_start": "5"}, "Unknown training value 'schedule_start'"),
        ({"schedule_start_ratio": "0.5"}, "Unknown training value 'schedule_start_ratio'"),
        ({"max_steps": "1e3"}, "max_steps is '1e3', but must be a whole number"),
        ({"max_steps": "0x10"}, "max_steps is '0x10', but must be a whole number"),
        ({"max_steps": "٣"}, "max_steps is '٣', but must be a whole number"),
        ({"dropout": "٣"}, "dropout is '٣', but must be a number"),
        ({"max_steps": "9" * 5000}, "max_steps is '9+…9+', but must be a whole number"),
        ({"world_size": "0"}, "world_size is 0, but must be from 1 to 1024"),
        ({"world_size": "17"}, "world_size is 17, but batch_size is 16: each process needs a row"),
        ({"batch_size": str(2**63)}, "batch_size is 9223372036854775808, but must be from 1 to 65536"),
        ({"learning_rate": "0"}, "learning_rate is 0.0, but must be from 1e-08 to 1"),
        ({"learning_rate": "1e-300"}, "learning_rate is 1e-300"),
        ({"beta1": "1"}, "beta1 is 1.0, but must be from 0 to 0.9999"),
        ({"beta2": "0.9999999999"}, "beta2 is 0.9999999999"),
        ({"weight_decay": "400"}, "weight_decay is 400.0 with a learning_rate of 0.004"),
        ({"max_gradient_norm": "-1"}, "max_gradient_norm is -1.0, but must be from 0.001 to .*, or 0 to clip nothing"),
        ({"max_gradient_norm": "1e-30"}, "max_gradient_norm is 1e-30"),
        ({"max_gradient_norm": "nan"}, "max_gradient_norm is nan"),
        ({"final_learning_rate_ratio": "1.5"}, "final_learning_rate_ratio is 1.5, but must be from 0 to 1"),
        ({"evaluation_interval": "0"}, "evaluation_interval is 0"),
        ({"evaluation_windows": "0"}, "evaluation_windows is 0"),
        ({"report_interval": "0"}, "report_interval is 0"),
        ({"validation_share": "0"}, "validation_share is 0.0"),
        ({"context_length": "1"}, "context_length is 1, but must be from 2 to"),
        ({"layers": "1000000000"}, "layers is 1000000000, but must be from 1 to"),
        ({"max_train_tokens": "128"}, "max_train_tokens is 128, but one window of context_length needs 129 tokens"),
        ({"max_validation_tokens": "5"}, "max_validation_tokens is 5, but one window"),
    ],
)
def test_a_wrong_override_raises_an_error_that_names_the_value(values: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        find_preset("demo").override(values)


@given(
    st.sampled_from(sorted(find_preset("demo").to_dict())), st.text() | st.floats().map(str) | st.integers().map(str)
)
def test_any_text_gives_a_storable_value_or_a_short_error(name: str, text: str) -> None:
    try:
        changed = find_preset("demo").override({name: text})
    except InvalidArgument as error:
        assert len(str(error)) <= 300 and str(error).isprintable()
    else:
        assert TrainingConfig.from_dict(json.loads(json.dumps(changed.to_dict(), allow_nan=False))) == changed
        # A manifest can hold it.
        assert all(abs(value) < 2**63 for value in changed.to_dict().values() if isinstance(value, int | float))


def test_a_configuration_survives_conversion_to_json() -> None:
    preset = find_preset("demo")
    assert TrainingConfig.from_dict(preset.to_dict()) == preset
    with pytest.raises(InvalidArgument, match="missing or unknown are 'width'"):
        TrainingConfig.from_dict({name: value for name, value in preset.to_dict().items() if name != "width"})


def test_values_that_an_older_program_did_not_know_have_their_defaults() -> None:
    preset = find_preset("demo")
    older = {name: value for name, value in preset.to_dict().items() if not name.startswith("distillation")}
    assert TrainingConfig.from_dict(older) == preset


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", "400"), ("max_steps", 4.5), ("beta1", None), ("tied_head", 1), ("layers", True), ("beta2", 10**400)],
)
def test_a_value_of_the_wrong_type_raises_an_error_that_names_it(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} is .*, but must be of type"):
        TrainingConfig.from_dict(find_preset("demo").to_dict() | {name: value})


def test_a_schedule_must_start_before_it_ends() -> None:
    with pytest.raises(InvalidArgument, match="schedule_start is 320, but must be at least 0 and less than max_steps"):
        replace(find_preset("demo"), schedule_start=320)


@given(schedules())
def test_the_rate_never_exceeds_the_highest_and_ends_at_the_final_share(config: TrainingConfig) -> None:
    assert all(0 <= rate <= config.learning_rate * (1 + 1e-9) for rate in rates(config))
    assert rates(config)[-1] == pytest.approx(config.learning_rate * config.final_learning_rate_ratio, abs=1e-12)


@given(schedules())
def test_the_warm_up_reaches_the_highest_rate_and_the_decay_starts_from_it(config: TrainingConfig) -> None:
    assert config.schedule_start <= config.warmup_end <= config.decay_start < config.max_steps
    for step in (config.warmup_end, config.decay_start, *range(max(config.warmup_end - 1, config.schedule_start))[-1:]):
        if step >= config.warmup_end - 1:
            assert config.learning_rate_at(step) == pytest.approx(config.learning_rate)


@given(schedules())
def test_the_rate_never_jumps(config: TrainingConfig) -> None:
    # Without a warm-up the first rate is already the highest.
    before = config.learning_rate * config.schedule_start_ratio
    each = [before, *rates(config)] if config.warmup_end > config.schedule_start else rates(config)
    assert all(abs(after - before) <= largest_change(config) for before, after in pairwise(each))


@given(schedules(), st.data())
def test_the_rate_does_not_jump_when_a_run_continues_to_another_end(begun: TrainingConfig, data: st.DataObject) -> None:
    step = data.draw(st.integers(begun.schedule_start + 1, begun.max_steps))
    other = replace(begun, schedule_start=0, max_steps=data.draw(st.integers(step + 1, 600)))
    config = other.continuing(begun, step)
    if other.max_steps == begun.max_steps:
        assert config == begun
    else:
        assert config.schedule_start == step
        change = abs(config.learning_rate_at(step) - begun.learning_rate_at(step - 1))
        assert change <= largest_change(config) or config.warmup_end == step


@given(schedules(), st.data())
def test_a_continued_stable_phase_equals_that_of_a_run_planned_to_the_new_end(
    planned: TrainingConfig, data: st.DataObject
) -> None:
    begun = replace(planned, schedule="wsd", warmup_steps=20, schedule_start=0, schedule_start_ratio=0.0, max_steps=200)
    stable = data.draw(st.integers(20, max(begun.decay_start, 20)))
    longer = replace(begun, max_steps=data.draw(st.integers(201, 600)))
    config = longer.continuing(begun, stable)
    for step in range(stable, longer.max_steps + 1):
        expected = replace(longer, schedule_start=stable, schedule_start_ratio=1.0).learning_rate_at(step)
        assert config.learning_rate_at(step) == expected
        if longer.decay_start >= stable:
            assert config.learning_rate_at(step) == longer.learning_rate_at(step)


def test_a_finished_cosine_continues_at_its_last_rate_and_decays() -> None:
    begun = replace(find_preset("demo"), max_steps=400, warmup_steps=50, learning_rate=1e-3)
    config = replace(begun, max_steps=800).continuing(begun, 400)
    assert (config.schedule_start, config.warmup_end) == (400, 400)
    expected = [1e-4, 5.5e-5, 1e-5]
    assert [config.learning_rate_at(step) for step in (400, 600, 800)] == pytest.approx(expected, rel=1e-3)


def test_a_schedule_that_changes_midway_decays_from_the_current_rate() -> None:
    begun = replace(find_preset("demo"), max_steps=400, warmup_steps=50, learning_rate=1e-3)
    config = replace(begun, max_steps=800).continuing(begun, 225)
    assert (config.schedule_start, config.warmup_end) == (225, 225)
    assert config.learning_rate == begun.learning_rate_at(224) == pytest.approx(5.5e-4, rel=1e-2)
    assert config.learning_rate_at(800) == pytest.approx(5.5e-5, rel=1e-2)


def test_an_unfinished_warm_up_continues_to_the_planned_rate() -> None:
    begun = replace(find_preset("demo"), max_steps=400, warmup_steps=50, learning_rate=1e-3)
    config = replace(begun, max_steps=800).continuing(begun, 20)
    assert config.learning_rate == 1e-3 and config.schedule_start_ratio == pytest.approx(0.4)


def test_a_rate_that_decayed_to_zero_warms_up_to_a_tenth() -> None:
    begun = replace(
        find_preset("demo"), max_steps=400, warmup_steps=50, learning_rate=1e-3, final_learning_rate_ratio=0.0
    )
    config = replace(begun, max_steps=800).continuing(begun, 400)
    assert (config.learning_rate, config.warmup_end, config.learning_rate_at(800)) == (1e-4, 450, 0.0)


def test_a_rate_that_is_chosen_is_warmed_up_to() -> None:
    begun = replace(find_preset("demo"), max_steps=400, warmup_steps=50, learning_rate=1e-3)
    config = replace(begun, max_steps=800).continuing(begun, 400, {"learning_rate"})
    assert (config.schedule_start, config.warmup_end) == (400, 450)
    assert config.schedule_start_ratio == pytest.approx(0.1, rel=1e-3)
    expected = [1e-4 + 9e-4 / 50, 1e-3, 1e-3, 5.5e-4, 1e-4]
    assert [config.learning_rate_at(step) for step in (400, 449, 450, 625, 800)] == pytest.approx(expected, rel=1e-3)


def test_a_linear_decay_that_continues_is_stable_at_the_rate_it_reached() -> None:
    begun = replace(find_preset("demo"), schedule="wsd", max_steps=400, warmup_steps=50, learning_rate=1e-3)
    assert begun.decay_start == 320
    config = replace(begun, max_steps=1000).continuing(begun, 361)
    assert config.learning_rate == pytest.approx(5.5e-4) and config.schedule_start_ratio == 1.0
    assert (config.warmup_end, config.decay_start) == (361, 800)
    assert config.learning_rate_at(1000) == pytest.approx(5.5e-5)


def test_a_warm_up_takes_half_of_a_short_schedule() -> None:
    begun = replace(find_preset("demo"), max_steps=400, warmup_steps=50)
    assert replace(begun, max_steps=410).continuing(begun, 400, {"learning_rate"}).warmup_end == 405
    assert replace(begun, max_steps=30).warmup_end == 15


def test_a_lower_rate_starts_a_new_schedule_and_other_values_do_not() -> None:
    begun = replace(find_preset("demo"), max_steps=400, warmup_steps=50, learning_rate=1e-3)
    lower = replace(begun, learning_rate=1e-4).continuing(begun, 100, {"learning_rate"})
    assert (lower.schedule_start, lower.schedule_start_ratio) == (100, 1.0)
    same = replace(begun, dropout=0.2, batch_size=3, world_size=3, max_gradient_norm=0.5)
    assert same.continuing(begun, 100) == same
    # A version at step 0 is untrained.
    fresh = replace(begun, warmup_steps=0)
    assert begun.continuing(fresh, 0) == begun


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule": "cosine"}, {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        ({"schedule": "wsd", "decay_ratio": "0.2"}, {0: 0.1, 9: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 500: 0.1}),
    ],
)
def test_the_rates_of_single_steps(values: dict[str, str], expected: dict[int, float]) -> None:
    shape = {"max_steps": "110", "warmup_steps": "10", "learning_rate": "1.0"}
    config = find_preset("demo").override(shape | values)
    assert {step: config.learning_rate_at(step) for step in expected} == pytest.approx(expected)
