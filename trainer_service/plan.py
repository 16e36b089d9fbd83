"""Estimates what a training job will do and take, before it starts. Loads no model framework."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from shared.device.machine import cpu_threads, memory_limit_bytes
from shared.errors import NotFound
from shared.gpt.config import GPTConfig, count_parameters
from shared.registry.registry import Registry
from shared.text import format_duration, format_size
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import DEFAULT_DATASET
from trainer_service.jobs.specs import Teacher, TrainSpec
from trainer_service.teachers import find, with_tokenizer
from trainer_service.text.text_size import estimate_characters
from trainer_service.training.config import TrainingConfig, micro_batches

# Memory of a training process before its first step: interpreter and libraries.
_PROCESS_BYTES = 100 << 20
# The most rows whose logits exist at a time (`LOGIT_ROWS` of `loss.h`), and about how many numbers a product and
# attention copy (`SPACE` of `matrices.h`).
_LOGIT_ROWS, _PRODUCT_NUMBERS = 256, 1 << 20
# The least that an undisturbed CPU thread reaches: 35e9 to 50e9 were measured with the presets.
_GUESSED_FLOPS_PER_THREAD = 30e9
# The start of a process and its first step, if what it computes with must be compiled and if that was compiled before.
_FIRST_START_S, _START_S = 15.0, 4.0
# The speed of two cores at training a tokenizer, which reads a limited number of characters, and at tokenising.
_LEARNED_CHARACTERS_PER_S, _LEARNED_CHARACTERS = 1e6, 32 << 20
_TOKENISED_CHARACTERS_PER_S = 5e6
_CHARACTERS_PER_TOKEN = 4
# The size of the built-in stories; a data set of the hub counts as larger than the part that is read.
_BUILTIN_CHARACTERS = 9_100_000
# An evaluation has no backward pass, so it does a third of the work on a token.
_EVALUATION_SHARE = 1 / 3


@dataclass(frozen=True)
class Machine:
    """The machine of the job: its memory, and the threads that compute on a CPU; None if a GPU computes."""

    memory_bytes: int
    threads: int | None

    @classmethod
    def here(cls) -> "Machine":
        """Returns this machine, as the worker will use it."""
        memory_bytes = memory_limit_bytes()
        if sys.platform != "linux":
            return cls(memory_bytes, None)
        try:
            distribution("mlx-cpu")
        except PackageNotFoundError:
            return cls(memory_bytes, None)
        return cls(memory_bytes, cpu_threads())


@dataclass(frozen=True)
class Plan:
    """What a job will do, with values of earlier jobs; None for a value that no earlier job has.

    `text_tokens` is the number of tokens of the prepared text, `preparation_s` the time that an earlier job on the same
    text took before its first step, and `tokens_per_second` the speed of an earlier job with the same model, batch and
    teachers. `teachers` are the run's values with the shape of each teacher that is known before the run begins.
    """

    spec: TrainSpec
    first_step: int
    text_tokens: int | None
    preparation_s: float | None
    tokens_per_second: float | None
    machine: Machine
    teachers: tuple[TrainingConfig, ...] = ()

    @property
    def tokens(self) -> int:
        """The number of target tokens from the first step to the last."""
        return (self.spec.config.max_steps - self.first_step) * self.spec.config.tokens_per_step

    @property
    def before_s(self) -> float:
        """The time until the first step is done."""
        start_s = _START_S if self.tokens_per_second else _FIRST_START_S
        if self.preparation_s is not None:
            return start_s + self.preparation_s
        config, characters = self.spec.config, _characters(self.spec)
        tokenised = min(_wanted_tokens(self.spec) * _CHARACTERS_PER_TOKEN, characters)
        trains = config.tokenizer == "bpe" and self.spec.resume is None and not self.spec.teachers
        learned = min(characters, _LEARNED_CHARACTERS) if trains else 0
        return start_s + learned / _LEARNED_CHARACTERS_PER_S + tokenised / _TOKENISED_CHARACTERS_PER_S

    @property
    def time_s(self) -> float | None:
        """The time that the job takes in all, at the earlier speed, or else at a guess for a CPU; None for a GPU."""
        config = self.spec.config
        speed = self.tokens_per_second
        if not speed:
            if self.machine.threads is None:
                return None
            # A teacher only predicts, as an evaluation does.
            flops = flops_per_token(config) + sum(map(flops_per_token, self.teachers)) * _EVALUATION_SHARE
            speed = min(self.machine.threads, config.batch_size) * _GUESSED_FLOPS_PER_THREAD / (_passes(config) * flops)
        evaluations = config.max_steps // config.evaluation_interval - self.first_step // config.evaluation_interval
        evaluations += config.max_steps % config.evaluation_interval > 0
        evaluated = evaluations * config.evaluation_windows * config.context_length
        return self.before_s + (self.tokens + evaluated * _EVALUATION_SHARE) / speed

    @classmethod
    def of(cls, spec: TrainSpec, registry: Registry, jobs: Iterable[JobRecord], machine: Machine) -> "Plan":
        """Returns the plan of a job, with values of earlier jobs, which `jobs` yields, the newest first."""
        first_step = registry.version(spec.resume).step if spec.resume is not None else 0
        text_tokens, preparation_s, tokens_per_second = None, None, None
        for job in jobs:
            if isinstance(job.spec, TrainSpec):
                if job.started and _text(job.spec) == _text(spec):
                    text_tokens = text_tokens or job.started.train_tokens
                    # The tokens are kept, so the next job takes about as long as the fastest one.
                    if job.started.preparation_s is not None:
                        preparation_s = min(preparation_s or job.started.preparation_s, job.started.preparation_s)
                if job.progress and not tokens_per_second and _work(job.spec) == _work(spec):
                    # The first step may compile, so it says nothing about the speed.
                    tokens_per_second = job.progress.tokens_per_second if job.progress.eta_s is not None else None
        teachers = tuple(_shapes(spec, registry))
        return cls(spec, first_step, text_tokens, preparation_s, tokens_per_second, machine, teachers)

    def lines(self) -> list[str]:
        """Describes the plan, in one line for each subject."""
        config = self.spec.config
        text = f"{self.tokens:,} tokens"
        if self.text_tokens:
            share = config.teacher_share if self.spec.data.mixes_stories else 0.0
            text += f", {(1 - share) * self.tokens / self.text_tokens:.1f} epochs of {self.text_tokens:,}"
        lines = [
            f"steps       {self.first_step + 1:,} to {config.max_steps:,}: {text}",
            f"schedule    {self._schedule()}",
        ]
        if _teaching(self.spec):
            names = ", ".join(each.version for each in self.spec.teachers)
            lines.append(f"teachers    {names}: {config.distillation_alpha:g} of the loss")
        memory = memory_bytes(config, self.machine, self.teachers)
        if memory is not None:
            each = f" in each of {config.world_size} processes" if config.world_size > 1 else ""
            lines.append(f"memory      about {format_size(memory)}{each}, on {self.machine.threads} CPU threads")
        lines.append(f"time        {self._time()}")
        if memory is not None and memory > self.machine.memory_bytes:
            lines.append(
                f"warning: this machine has {format_size(self.machine.memory_bytes)} of memory, less than the job is "
                "expected to need. Set a smaller batch_size, or OMP_NUM_THREADS to fewer threads."
            )
        return lines

    def _schedule(self) -> str:
        """Describes the phases that are still to come."""
        config, phases = self.spec.config, []
        peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
        if self.first_step < config.warmup_end:
            again = "re-warm" if config.schedule_start else "warm-up"
            phases.append(f"{again} to {peak:.1e} at step {config.warmup_end:,}")
        if self.first_step < config.decay_start and config.warmup_end < config.decay_start:
            phases.append(f"stable at {peak:.1e} to step {config.decay_start:,}")
        decay = "cosine" if config.schedule == "cosine" else "linear"
        phases.append(f"{decay} to {final:.1e} at step {config.max_steps:,}")
        text = ", ".join(phases)
        if self.spec.resume is None:
            return text
        rate = config.learning_rate_at(self.first_step)
        text = f"continues version {self.spec.resume} at step {self.first_step:,} with {rate:.1e}; {text}"
        if config.schedule == "cosine" and 0 < self.first_step == config.schedule_start == config.warmup_end:
            text += "; if you set a higher learning_rate, the loss rises first and may end lower"
        return text

    def _time(self) -> str:
        if self.time_s is None:
            return "known after the first steps"
        before = format_duration(self.before_s)
        about = f"about {format_duration(self.time_s)}, {before} of it until the first step is done"
        if self.tokens_per_second:
            return f"{about}, at the {self.tokens_per_second:,.0f} tokens/s of an earlier job"
        return f"{about}; a guess, known after the first steps"


def _text(spec: TrainSpec) -> tuple[object, ...]:
    """Returns the values on which the number of prepared tokens depends."""
    config = spec.config
    return spec.data, config.tokenizer, config.vocabulary_size, config.validation_share, _wanted_tokens(spec)


def _wanted_tokens(spec: TrainSpec) -> int:
    config = spec.config
    return config.max_train_tokens or config.max_steps * config.batch_size * (config.context_length + 1)


def _characters(spec: TrainSpec) -> float:
    """Returns about how many characters the training text has; infinity if that is unknown."""
    text = spec.data.without_mixed.dataset
    if text == (DEFAULT_DATASET,):
        return _BUILTIN_CHARACTERS
    try:
        return sum(estimate_characters(Path(name)) for name in text)
    except OSError:
        return math.inf


def _work(spec: TrainSpec) -> tuple[object, ...]:
    """Returns the values on which the speed of a step depends."""
    config = spec.config
    return config.gpt, config.optimizer, _passes(config), config.batch_size, config.world_size, _teaching(spec)


def _passes(config: TrainingConfig) -> int:
    """Returns how often a step passes over its batch."""
    return 2 if config.masked_loss else 1


def _teaching(spec: TrainSpec) -> tuple[Teacher, ...]:
    """Returns the teachers whose predictions the run learns."""
    return spec.teachers if spec.config.distillation_alpha else ()


def _shapes(spec: TrainSpec, registry: Registry) -> Iterator[TrainingConfig]:
    for teacher in _teaching(spec):
        # Another job may still have to publish what a label names.
        with suppress(NotFound):
            taught = find(teacher, registry, spec.resume).manifest
            model = GPTConfig.from_dict(taught.model)
            config = with_tokenizer(spec.config, taught.tokenizer, model.vocabulary_size)
            shape = model.to_dict() | {"context_length": config.context_length, "dropout": 0.0}
            yield replace(config, **shape)  # type: ignore[arg-type]


def memory_bytes(config: TrainingConfig, machine: Machine, teachers: Sequence[TrainingConfig] = ()) -> int | None:
    """Returns the peak memory of a training process on a CPU, within about 30 % of measurements; None for a GPU.

    In fp32, training holds the weights, the moments, the gradients that the optimizer reads, and for each thread the
    gradients of its rows, the arrays of a micro-batch, and those of a matrix that Muon updates. An evaluation has other
    arrays for a micro-batch. A teacher has weights; its pass uses the memory of the student's, which comes later.
    Several processes share the rows and, on one machine, the threads; each joins its gradients in one more array.
    """
    if machine.threads is None:
        return None
    T, processes = config.context_length, config.world_size
    own_rows = -(-config.batch_size // processes)
    threads = min(max(machine.threads // processes, 1), own_rows)
    rows = -(-own_rows // threads)
    parameters = count_parameters(config.gpt).total
    held = (2 + (processes > 1)) * parameters + count_moments(config)
    held += sum(count_parameters(each.gpt).total for each in teachers)
    tokens = -(-rows // micro_batches(rows, T)) * T
    held += threads * (parameters + _pass_numbers(config, tokens, teachers))
    held += machine.threads // processes * _muon_numbers(config)
    evaluating = min(threads, -(-config.evaluation_windows // rows))
    return _PROCESS_BYTES + 4 * (held + evaluating * _evaluation_numbers(config, tokens))


def count_moments(config: TrainingConfig) -> int:
    """Returns how many numbers the optimizer keeps: two for each parameter, but with Muon one for those of the matrices
    of the blocks."""
    matrices = config.layers * 2 * config.width * (2 * config.width + config.hidden_width)
    return 2 * count_parameters(config.gpt).total - (config.optimizer == "muon") * matrices


def _pass_numbers(config: TrainingConfig, tokens: int, teachers: Sequence[TrainingConfig]) -> int:
    """Returns how many numbers a thread holds for the gradients of some tokens, as `step.cpp` lays them out."""
    C, F = config.width, config.hidden_width
    numbers = config.layers * (6 * C + F + config.heads) + 11 * C + 2 * F + sum(teacher.width for teacher in teachers)
    logits = min(tokens, _LOGIT_ROWS) * config.vocabulary_size
    return _PRODUCT_NUMBERS + tokens * numbers + (2 if teachers else 1) * logits


def _muon_numbers(config: TrainingConfig) -> int:
    """Returns how many numbers a thread holds for the update of the largest matrix, as `optimizer.h` lays them out."""
    if config.optimizer != "muon":
        return 0
    C, F = config.width, config.hidden_width
    return _PRODUCT_NUMBERS + 3 * C * max(C, F) + 2 * min(C, F) ** 2


def _evaluation_numbers(config: TrainingConfig, tokens: int) -> int:
    """Returns how many numbers a thread holds for the losses of some tokens."""
    numbers = 8 * config.width + 2 * config.hidden_width + config.heads
    return _PRODUCT_NUMBERS + tokens * numbers + min(tokens, _LOGIT_ROWS) * config.vocabulary_size


def flops_per_token(config: TrainingConfig) -> int:
    """Returns the floating-point operations of training on one token.

    6 for each weight of a matrix product, and 12 for each layer, number of the width and visible key; on average half
    of the context is visible.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    count = count_parameters(config.gpt)
    weights = count.total - count.embedding + (config.vocabulary_size * config.width if config.tied_head else 0)
    return 6 * weights + 12 * config.layers * config.width * config.context_length // 2
