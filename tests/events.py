"""Events of a training run for the tests of the trainer."""

from trainer_service.jobs.events import Progress, RunStarted

STARTED = RunStarted(
    parameters=52_990_464,
    embedding_parameters=19_495_296,
    train_tokens=483_000,
    validation_tokens=32_769,
    tokenizer="gpt2",
    first_step=1,
    first_tokens=100,
    max_steps=10,
    device="cpu",
)
PROGRESS = Progress(
    step=1,
    max_steps=10,
    loss=10.8344,
    learning_rate=1.5e-7,
    gradient_norm=0.5,
    tokens=300,
    tokens_per_second=1234.5,
    eta_s=3725.0,
    best_validation_loss=10.5,
    active_memory_bytes=1,
    cache_memory_bytes=2,
    peak_memory_bytes=3,
    resident_memory_bytes=4,
)
