import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from shared.gpt.config import count_parameters
from shared.gpt.model import GPT
from shared.text import format_size
from tests.events import PROGRESS, STARTED
from tests.registries import disk_registry
from tests.shared.registry.scenarios import publish
from trainer_service import plan
from trainer_service.jobs.events import Progress, TimedEvent
from trainer_service.jobs.records import JobRecord, read_record
from trainer_service.jobs.specs import Teacher, TrainSpec
from trainer_service.plan import Machine, Plan, count_moments, flops_per_token, memory_bytes
from trainer_service.presets import find_preset
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.config import TrainingConfig
from trainer_service.training.optimizer import Optimizer

CPU, GPU = Machine(16 << 30, 4), Machine(16 << 30, None)
DEMO = replace(find_preset("demo"), optimizer="adamw", learning_rate=1e-3, warmup_steps=100, max_steps=2000)


def make(
    config: TrainingConfig = DEMO,
    first_step: int = 0,
    text_tokens: int | None = None,
    speed: float | None = None,
    preparation_s: float | None = None,
    machine: Machine = CPU,
) -> Plan:
    spec = TrainSpec("run", "demo", config, DatasetSpec(("builtin",)), 3 if first_step else None)
    return Plan(spec, first_step, text_tokens, preparation_s, speed, machine)


def line(plan: Plan, subject: str) -> str:
    (found,) = [each for each in plan.lines() if each.startswith(subject)]
    return found


def test_steps_tokens_and_epochs() -> None:
    assert line(make(), "steps") == "steps       1 to 2,000: 4,096,000 tokens"
    planned = make(first_step=1000, text_tokens=1_024_000)
    assert line(planned, "steps") == "steps       1,001 to 2,000: 2,048,000 tokens, 2.0 epochs of 1,024,000"


def test_windows_of_stories_are_none_of_the_text() -> None:
    planned = make(replace(DEMO, teacher_share=0.25), text_tokens=1_024_000)
    for names, epochs in ((("builtin", "teacher:a"), "3.0"), (("teacher:a",), "4.0")):
        mixed = replace(planned, spec=replace(planned.spec, data=DatasetSpec(names)))
        assert line(mixed, "steps").endswith(f": 4,096,000 tokens, {epochs} epochs of 1,024,000")


WSD = replace(DEMO, schedule="wsd")
# The same model, and a version at its end, continued to another.
AGAIN = replace(DEMO, max_steps=8000).continuing(DEMO, 2000)
FASTER = replace(DEMO, max_steps=8000).continuing(DEMO, 2000, {"learning_rate"})
STABLE = replace(WSD, max_steps=8000).continuing(WSD, 1000)


@pytest.mark.parametrize(
    ("config", "first_step", "text"),
    [
        (DEMO, 0, "warm-up to 1.0e-03 at step 100, cosine to 1.0e-04 at step 2,000"),
        (replace(DEMO, warmup_steps=0), 0, "cosine to 1.0e-04 at step 2,000"),
        (
            WSD,
            0,
            "warm-up to 1.0e-03 at step 100, stable at 1.0e-03 to step 1,600, linear to 1.0e-04 at step 2,000",
        ),
        (DEMO, 1050, "continues version 3 at step 1,050 with 5.5e-04; cosine to 1.0e-04 at step 2,000"),
        (
            AGAIN,
            2000,
            "continues version 3 at step 2,000 with 1.0e-04; cosine to 1.0e-05 at step 8,000; if you set a higher "
            "learning_rate, the loss rises first and may end lower",
        ),
        (
            FASTER,
            2000,
            "continues version 3 at step 2,000 with 1.1e-04; re-warm to 1.0e-03 at step 2,100, "
            "cosine to 1.0e-04 at step 8,000",
        ),
        (
            STABLE,
            1000,
            "continues version 3 at step 1,000 with 1.0e-03; stable at 1.0e-03 to step 6,400, "
            "linear to 1.0e-04 at step 8,000",
        ),
    ],
)
def test_the_schedule_is_described_by_its_coming_phases(config: TrainingConfig, first_step: int, text: str) -> None:
    assert line(make(config, first_step), "schedule") == f"schedule    {text}"


def test_time_is_of_preparation_steps_and_evaluations_at_the_speed_of_an_earlier_job() -> None:
    planned = make(speed=4096.0, preparation_s=6.0)
    assert planned.before_s == 10
    evaluations = -(-2000 // DEMO.evaluation_interval) * 64 * 128 / 3
    assert planned.time_s == pytest.approx(10 + (4_096_000 + evaluations) / 4096)
    assert line(planned, "time") == (
        "time        about 17 min, 10 s of it until the first step is done, at the 4,096 tokens/s of an earlier job"
    )


def test_without_an_earlier_job_time_is_a_guess_that_leaves_nothing_out(tmp_path: Path) -> None:
    short = make(replace(DEMO, max_steps=20))
    assert short.time_s is not None and 20 < short.time_s < 60
    assert line(short, "time").endswith("until the first step is done; a guess, known after the first steps")
    text = tmp_path / "stories.txt"
    text.write_bytes(b"x" * 1_000_000)
    local = replace(short, spec=replace(short.spec, data=DatasetSpec((str(text),))))
    assert local.before_s == pytest.approx(15 + 1 + 164_000 / 5e6, rel=0.05)
    hub = replace(short, spec=replace(short.spec, data=DatasetSpec(("wikitext-103",))))
    assert hub.before_s == pytest.approx(15 + 33.6, rel=0.05)
    assert line(make(machine=GPU), "time") == "time        known after the first steps"


def test_a_plan_learns_from_jobs_that_got_further_than_their_first_step(tmp_path: Path) -> None:
    spec = make().spec

    def record(preparation_s: float, progress: Progress) -> JobRecord:
        started = replace(STARTED, preparation_s=preparation_s)
        fields = {"kind": "train", "spec": spec.to_json(), "state": "finished", "attempt": "1"}
        told = {"RunStarted": TimedEvent(started).to_json(), "Progress": TimedEvent(progress).to_json()}
        return read_record("a", fields | told)

    jobs = [record(3.0, replace(PROGRESS, eta_s=None)), record(40.0, PROGRESS)]
    planned = Plan.of(spec, disk_registry(tmp_path), jobs, CPU)
    assert (planned.text_tokens, planned.preparation_s) == (STARTED.train_tokens, 3.0)
    assert planned.tokens_per_second == PROGRESS.tokens_per_second


def test_teachers_are_named_and_count_in_time_and_memory(tmp_path: Path) -> None:
    registry = disk_registry(tmp_path)
    config = replace(DEMO, max_steps=100_000)
    wide = replace(DEMO, width=320, hidden_width=1280, context_length=256, dropout=0.1)
    publish(registry, model=wide.gpt.to_dict(), training=wide.to_dict())
    teachers = (Teacher("1", registry.version(1).digest), Teacher("run:later"))
    spec = TrainSpec("run", "demo", config, DatasetSpec(("builtin",)), None, teachers=teachers)
    alone, taught = (Plan.of(each, registry, (), CPU) for each in (replace(spec, teachers=()), spec))
    assert line(taught, "teachers") == "teachers    1, run:later: 0.7 of the loss"
    # What a label will name is not known yet; the other one reads the student's windows, without dropout.
    assert taught.teachers == (replace(wide, max_steps=100_000, context_length=128, dropout=0.0),)
    assert alone.time_s is not None and taught.time_s is not None
    work = flops_per_token(config)
    expected = 1 + flops_per_token(taught.teachers[0]) / 3 / work
    # The tokenizer is the teacher's.
    assert (taught.time_s - taught.before_s) / (alone.time_s - alone.before_s) == pytest.approx(expected)
    assert taught.before_s < alone.before_s
    weights_bytes = count_parameters(wide.gpt).total * 4
    needed, without = memory_bytes(config, CPU, taught.teachers), memory_bytes(config, CPU)
    assert needed is not None and without is not None and needed > without + weights_bytes
    assert format_size(needed) in line(taught, "memory")

    control = Plan.of(replace(spec, config=replace(config, distillation_alpha=0.0)), registry, (), CPU)
    assert control.time_s == pytest.approx(alone.time_s, rel=1e-3)
    assert not any(each.startswith("teachers") for each in control.lines())


def test_the_speed_of_a_job_with_other_teachers_says_nothing(tmp_path: Path) -> None:
    registry = disk_registry(tmp_path)
    publish(registry, model=DEMO.gpt.to_dict(), training=DEMO.to_dict())
    taught = replace(make().spec, teachers=(Teacher("1", registry.version(1).digest),))
    fields = {"kind": "train", "spec": make().spec.to_json(), "state": "finished", "attempt": "1"}
    job = read_record("a", fields | {"Progress": TimedEvent(PROGRESS).to_json()})
    assert Plan.of(make().spec, registry, [job], CPU).tokens_per_second == PROGRESS.tokens_per_second
    assert Plan.of(taught, registry, [job], CPU).tokens_per_second is None


def test_training_takes_6_operations_for_a_weight_and_token_and_those_of_attention() -> None:
    # 4 blocks of 3 matrices' weights each and a head that is tied, with LayerNorms and biases beside.
    products = 4 * (12 * 160 * 160) + 2048 * 160
    attention = 12 * 4 * 160 * 64
    assert flops_per_token(DEMO) == pytest.approx(6 * products + attention, rel=0.02)
    assert flops_per_token(replace(DEMO, tied_head=False)) == flops_per_token(DEMO)


@pytest.mark.parametrize(
    ("preset", "vocabulary_size", "threads", "measured_mib"),
    [
        ("demo", 2048, 4, 249),
        ("demo", 2048, 2, 211),
        ("demo", 2048, 1, 156),
        ("small", 2048, 4, 851),
        ("small", 2048, 2, 548),
        ("small", 2048, 1, 397),
        ("tinystories-53m", 50257, 4, 2840),
        ("tinystories-53m", 50257, 2, 1927),
    ],
)
def test_estimated_memory_is_near_measurements(
    preset: str, vocabulary_size: int, threads: int, measured_mib: int
) -> None:
    # The most that was ever resident in a run of some steps and evaluations, on a machine of 23.4 GiB.
    config = replace(find_preset(preset), vocabulary_size=vocabulary_size)
    expected = memory_bytes(config, Machine(round(23.4 * 2**30), threads))
    assert expected is not None
    assert expected / 2**20 == pytest.approx(measured_mib, rel=0.3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_moments_are_counted_as_the_optimizer_keeps_them(optimizer: str) -> None:
    config = replace(DEMO, optimizer=optimizer)
    state = Optimizer(config, GPT(config.gpt).trainable_parameters()).state
    moments: dict[str, mx.array] = dict(tree_flatten({"m": state["m"], "v": state["v"]}))
    assert count_moments(config) == sum(array.size for array in moments.values())


def test_each_thread_has_memory_for_a_matrix_of_muon() -> None:
    small = find_preset("small")
    assert small.optimizer == "muon"
    sizes = {name: memory_bytes(replace(small, optimizer=name), Machine(32 << 30, 64)) for name in ("muon", "adamw")}
    matrices = 4 * (count_moments(replace(small, optimizer="adamw")) - count_moments(small))
    # Muon's iterations hold about six arrays, and a product copies parts of its matrices.
    assert sizes["muon"] is not None and sizes["adamw"] is not None
    added = (sizes["muon"] - sizes["adamw"] + matrices) / 64
    assert 4 * 3 * 320 * 1280 < added < 4 * 8 * 320 * 1280


def test_the_rows_whose_logits_exist_are_those_of_the_library() -> None:
    source = (Path(plan.__file__).parent / "training/cpu/loss.h").read_text()
    assert f"LOGIT_ROWS = {plan._LOGIT_ROWS};" in source


@pytest.mark.parametrize("values", [{"optimizer": "muon"}, {"masked_loss": 0.4}])
def test_the_speed_of_a_job_with_steps_of_another_kind_says_nothing(tmp_path: Path, values: dict[str, object]) -> None:
    fields = {"kind": "train", "spec": make().spec.to_json(), "state": "finished", "attempt": "1"}
    job = read_record("a", fields | {"Progress": TimedEvent(PROGRESS).to_json()})
    other = make(replace(DEMO, **values)).spec  # type: ignore[arg-type]
    assert Plan.of(other, disk_registry(tmp_path), [job], CPU).tokens_per_second is None


def test_masked_inputs_double_the_guessed_time_of_the_steps() -> None:
    plain, masked = (make(replace(DEMO, masked_loss=share)) for share in (0.0, 0.4))
    assert plain.time_s is not None and masked.time_s is not None
    assert masked.time_s - masked.before_s == pytest.approx(2 * (plain.time_s - plain.before_s))


def test_several_processes_share_the_rows_and_the_threads() -> None:
    config = replace(find_preset("tinystories-53m"), batch_size=8)
    half = replace(config, batch_size=4)
    joined = 4 * count_parameters(config.gpt).total
    for threads in (4, 1):
        together = memory_bytes(replace(config, world_size=2), Machine(32 << 30, threads))
        assert together == (memory_bytes(half, Machine(32 << 30, max(threads // 2, 1))) or 0) + joined
    plan = make(replace(config, world_size=2), machine=Machine(32 << 30, 4))
    assert "in each of 2 processes, on 4 CPU threads" in line(plan, "memory")


def test_too_little_memory_is_a_warning() -> None:
    big = find_preset("gpt2-124m")
    assert not any(text.startswith("warning") for text in make(big, machine=Machine(64 << 30, 4)).lines())
    assert "this machine has 4.0 GiB" in line(make(big, machine=Machine(4 << 30, 4)), "warning")
    few = make(big, machine=Machine(4 << 30, None)).lines()
    assert not any(text.startswith(("warning", "memory")) for text in few)


def test_here_is_a_machine_with_memory() -> None:
    assert Machine.here().memory_bytes > 1 << 20


def test_the_memory_here_is_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "memory_limit_bytes", lambda: 8 << 30)
    assert Machine.here().memory_bytes == 8 << 30


def test_threads_are_those_that_the_worker_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "distribution", lambda name: name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Machine.here().threads == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Machine.here().threads == 3


def test_a_plan_loads_no_model_framework() -> None:
    code = "import sys, trainer_service.plan; sys.exit('mlx.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
