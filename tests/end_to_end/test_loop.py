"""The whole system as its users run it: real processes, a real Redis, real signals."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from deploy.ports import Ports, free_ports
from deploy.stack import Stack
from inference_service.client import InferenceClient
from shared.errors import NotFound, Unavailable
from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2 as pb
from shared.pb.training.v1 import training_pb2_grpc
from shared.registry.store import Registry
from shared.settings import Directories

PROJECT = Path(__file__).parents[2]
# Small enough for a step in some hundredths of a second, long enough for streams that outlast a swap.
TINY = {
    "vocabulary_size": "400",
    "layers": "1",
    "width": "32",
    "heads": "2",
    "hidden_width": "64",
    "context_length": "256",
    "batch_size": "2",
    "max_train_tokens": "40000",
    "evaluation_windows": "4",
    "report_interval": "5",
    "warmup_steps": "1",
}

# A step is so long then that what a test does between two evaluations happens between them.
LARGE_BATCH = "8"


@dataclass
class System:
    """Everything that runs, and ways to talk to it."""

    stack: Stack
    ports: Ports
    directories: Directories
    environment: dict[str, str]
    trainer: training_pb2_grpc.TrainingServiceStub = field(init=False)
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.ports.trainer}")
        self.trainer = training_pb2_grpc.TrainingServiceStub(self.channel)

    def client(self) -> InferenceClient:
        return InferenceClient(f"127.0.0.1:{self.ports.inference}")

    def enqueue(self, resume: int | None = None, **values: str) -> str:
        overrides = (TINY if resume is None else {}) | values
        response = self.trainer.EnqueueJob(pb.EnqueueJobRequest(overrides=overrides, resume=resume))
        assert response.live_workers == 1
        job: str = response.job.id
        return job

    def watch(self, job: str, until: Callable[[pb.WatchJobResponse], bool]) -> list[pb.WatchJobResponse]:
        """The events of a job up to the first that is waited for; fails where the job ends before."""
        events = []
        for event in self.trainer.WatchJob(pb.WatchJobRequest(job_id=job), timeout=120):
            events.append(event)
            if until(event):
                return events
        raise AssertionError(f"The job ended before: {events[-3:]}")

    def finish(self, job: str) -> list[pb.WatchJobResponse]:
        return self.watch(job, lambda event: event.state_changed.state == pb.JOB_STATE_FINISHED)

    def scrape(self, port: int) -> tuple[str, dict[str, float]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            text = page.read().decode()
        samples = {
            " ".join([sample.name, *(value for name, value in sample.labels.items() if name in ("kind", "state"))]): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return text, samples

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directories = Directories(tmp_path_factory.mktemp("system"))
    # Compiled kernels outlive the run, as those of the tests do.
    kernels = PROJECT / ".pytest_cache" / "system"
    kernels.mkdir(parents=True, exist_ok=True)
    directories.cache.symlink_to(kernels)
    ports = free_ports()
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    stack = Stack(directories, ports, environment, worker_stop_s=20)
    stack.up(lambda _: None)
    everything = System(
        stack, ports, directories, environment | ports.to_environment() | {"GPTLOOP_VAR": str(directories.var)}
    )
    yield everything
    everything.channel.close()
    stack.down()


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "The condition did not come true."
        time.sleep(0.05)


def is_progress(step: int) -> Callable[[pb.WatchJobResponse], bool]:
    return lambda event: bool(event.progress.step >= step)


def training_processes(system: System) -> list[int]:
    """The pids of the children of the worker."""
    statuses = {status.name: status.process for status in system.stack.status() or []}
    worker = statuses["worker"]
    assert worker is not None
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(worker.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_with_an_empty_registry_it_starts_and_says_that_nothing_serves(system: System) -> None:
    with system.client() as client, pytest.raises(Unavailable, match="No version serves yet"):
        list(client.generate("Once"))
    assert "NOT_SERVING" in system.command("deploy.stack", "status").stdout
    assert "No version yet" in system.command("trainer_service", "checkpoints").stdout


def test_streams_survive_the_swaps_that_training_causes(system: System) -> None:
    job = system.enqueue(max_steps="240", evaluation_interval="60")
    streams: list[tuple[int, int, list[inference_pb2.Finished]]] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def stream() -> None:
        with system.client() as client:
            while not done.is_set():
                try:
                    events = []
                    for event in client.generate("Once upon a time", ignore_eos=True, max_tokens=200):
                        events.append(event)
                        if len(events) == 150:  # some time before the end
                            serving = client.model().version
                except Unavailable:
                    time.sleep(0.05)  # nothing serves yet
                    continue
                except BaseException as error:
                    failures.append(error)
                    return
                started = events[0]
                assert isinstance(started, inference_pb2.Started)
                ends = [event for event in events if isinstance(event, inference_pb2.Finished)]
                streams.append((started.model_version, serving, ends))

    readers = [threading.Thread(target=stream) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        events = system.finish(job)
        last = Registry(system.directories.registry).labels()["best"]
        with system.client() as client:
            wait_until(lambda: client.model().version == last and any(started == last for started, _, _ in streams))
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert failures == []
    published = [event.version_published for event in events if event.HasField("version_published")]
    assert [version.version for version in published] == [1, 2, 3, 4]
    losses = [version.bits_per_byte for version in published]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert len({started for started, _, _ in streams}) > 1
    assert any(serving > started for started, serving, _ in streams), "No stream was open during a swap."
    for _, _, ends in streams:
        assert [(end.reason, end.generated_tokens) for end in ends] == [(inference_pb2.FINISH_REASON_LENGTH, 200)]
    assert next(event.progress.step for event in events if event.HasField("progress")) == 1


def test_a_version_and_a_seed_give_the_same_text_again(system: System) -> None:
    with system.client() as client:
        texts = set()
        for version in (1, 4, 1):
            events = list(client.generate("Once upon a time", version=version, seed=7, max_tokens=50))
            assert events[0].model_version == version and events[0].seed == 7  # type: ignore[union-attr]
            texts.add((version, "".join(event.text for event in events if isinstance(event, inference_pb2.Delta))))
        assert len(texts) == 2
        with pytest.raises(NotFound, match="no version 99"):
            list(client.generate("Once", version=99))


def test_both_metrics_pages_tell_what_happened(system: System) -> None:
    trainer_text, trainer = system.scrape(system.ports.trainer_metrics)
    inference_text, inference = system.scrape(system.ports.inference_metrics)
    assert trainer["gptloop_training_tokens_total"] == 240 * 2 * 256
    assert trainer["gptloop_training_step"] == 240
    assert trainer["gptloop_training_jobs finished"] == 1
    assert trainer["gptloop_training_queue_depth"] == 0
    assert 0 < trainer["gptloop_training_validation_loss"] < 7
    assert inference["gptloop_inference_swaps_total"] >= 1
    assert inference["gptloop_inference_generated_tokens_total"] >= 200
    assert inference["gptloop_inference_memory_bytes resident"] > 10 << 20
    assert inference["gptloop_inference_active_streams"] == 0
    if promtool := shutil.which("promtool"):
        for text in (trainer_text, inference_text):
            subprocess.run([promtool, "check", "metrics"], input=text, text=True, check=True)


def test_reflection_names_the_services(system: System) -> None:
    names = ProtoReflectionDescriptorDatabase(system.channel).get_services()
    assert "training.v1.TrainingService" in names and "grpc.health.v1.Health" in names


def test_a_finished_run_can_be_extended_and_its_token_count_goes_on(system: System) -> None:
    before = system.scrape(system.ports.trainer_metrics)[1]["gptloop_training_tokens_total"]
    job = system.enqueue(resume=4, max_steps="270", evaluation_interval="30")
    events = system.finish(job)
    assert next(event.run_started for event in events if event.HasField("run_started")).first_step == 241
    assert system.scrape(system.ports.trainer_metrics)[1]["gptloop_training_tokens_total"] == before + 30 * 2 * 256
    assert Registry(system.directories.registry).version(5).parent == 4


def test_what_cannot_be_trained_is_refused_with_a_sentence(system: System) -> None:
    def refused(**request: object) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            system.trainer.EnqueueJob(pb.EnqueueJobRequest(**request))  # type: ignore[arg-type]
        return caught.value.code(), caught.value.details() or ""

    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    assert refused(preset="huge") == (
        invalid,
        "Unknown preset 'huge'. The presets are demo, small, tinystories-53m, gpt2-124m.",
    )
    assert refused(overrides={"steps": "5"})[0] == invalid
    assert refused(dataset=["/nowhere/text.txt"])[0] == missing
    assert refused(resume=77)[0] == missing
    code, sentence = refused(resume=4)
    assert code == invalid and "nothing is left to do" in sentence and "max_steps=480" in sentence


def test_a_text_shorter_than_one_context_fails_the_job_with_a_sentence(system: System, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time there was very little text.")
    ended = system.command(
        "trainer_service", "train", "--preset", "tinystories-53m", "--dataset", str(text), "--set", "batch_size=1"
    )
    assert ended.returncode == 1
    assert "one window of context_length takes 513" in ended.stderr and "Traceback" not in ended.stderr


def test_a_training_process_that_is_killed_goes_on_from_its_last_state(system: System) -> None:
    job = system.enqueue(max_steps="300", evaluation_interval="100", batch_size=LARGE_BATCH)
    system.watch(job, is_progress(110))
    (process,) = training_processes(system)
    os.kill(process, signal.SIGKILL)
    events = system.finish(job)
    assert [event.run_started.first_step for event in events if event.HasField("run_started")] == [1, 101]
    assert any("signal 9" in event.state_changed.reason for event in events)


def test_a_worker_that_is_asked_to_stop_gives_its_job_back_with_its_state(system: System) -> None:
    job = system.enqueue(max_steps="200", evaluation_interval="100", batch_size=LARGE_BATCH)
    system.watch(job, is_progress(10))
    statuses = {status.name: status.process for status in system.stack.status() or []}
    assert statuses["worker"] is not None
    os.kill(statuses["worker"].pid, signal.SIGTERM)
    events = system.finish(job)
    starts = [event.run_started.first_step for event in events if event.HasField("run_started")]
    assert len(starts) == 2 and 10 < starts[1] < 100


def test_training_goes_on_while_redis_is_gone(system: System) -> None:
    job = system.enqueue(max_steps="1500", evaluation_interval="1500")
    system.watch(job, is_progress(10))
    statuses = {status.name: status.process for status in system.stack.status() or []}
    assert statuses["redis"] is not None
    os.kill(statuses["redis"].pid, signal.SIGKILL)

    def finished() -> bool:
        try:
            state = system.trainer.GetJob(pb.GetJobRequest(job_id=job)).job.state
        except grpc.RpcError:
            return False  # the supervisor is starting Redis again
        assert state != pb.JOB_STATE_FAILED
        return bool(state == pb.JOB_STATE_FINISHED)

    wait_until(finished, limit_s=120.0)
    events = system.finish(job)
    assert len([event for event in events if event.HasField("run_started")]) == 1


def test_a_running_job_can_be_cancelled_and_keeps_its_state(system: System) -> None:
    job = system.enqueue(max_steps="100000", evaluation_interval="50000")
    system.watch(job, is_progress(5))
    assert system.trainer.CancelJob(pb.CancelJobRequest(job_id=job)).job.state == pb.JOB_STATE_CANCELLING
    events = system.watch(job, lambda event: event.state_changed.state == pb.JOB_STATE_CANCELLED)
    last = [event.progress.step for event in events if event.HasField("progress")][-1]
    run = system.trainer.GetJob(pb.GetJobRequest(job_id=job)).job.run
    assert Registry(system.directories.registry).states(run) == [last]
    with pytest.raises(grpc.RpcError) as caught:
        system.trainer.CancelJob(pb.CancelJobRequest(job_id=job))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_loss_that_is_not_finite_fails_the_job_and_keeps_what_was_good(system: System) -> None:
    versions = len(Registry(system.directories.registry).versions())
    job = system.enqueue(max_steps="200", learning_rate="1", max_gradient_norm="1e30", weight_decay="1e30")
    events = system.watch(job, lambda event: event.state_changed.state == pb.JOB_STATE_FAILED)
    assert "training diverged" in events[-1].state_changed.reason
    assert len(Registry(system.directories.registry).versions()) == versions


def test_jobs_can_be_listed_in_pages(system: System) -> None:
    first = system.trainer.ListJobs(pb.ListJobsRequest(page_size=2))
    rest = system.trainer.ListJobs(pb.ListJobsRequest(page_token=first.next_page_token))
    ids = [job.id for page in (first, rest) for job in page.jobs]
    assert len(first.jobs) == 2 and len(ids) == len(set(ids)) >= 6 and not rest.next_page_token
    failed = system.trainer.ListJobs(pb.ListJobsRequest(states=[pb.JOB_STATE_FAILED])).jobs
    assert len(failed) == 2 and all(job.failure for job in failed)


def test_without_a_worker_a_job_waits_and_the_command_says_so(system: System) -> None:
    """Last, as it stops everything."""
    system.stack.down()
    ended = system.command("trainer_service", "train")
    assert ended.returncode == 1 and "make up" in ended.stderr and "Traceback" not in ended.stderr
