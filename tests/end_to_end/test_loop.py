"""The whole system as its users run it: real processes, a real Redis, real signals."""

import shutil
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from inference_service.client import AdminClient
from shared.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2 as pb
from shared.pb.training.v1 import training_pb2_grpc
from tests.end_to_end.conftest import System, is_progress
from tests.fakes import publish_overflowing_version
from tests.registries import disk_registry
from tests.waiting import wait_until
from trainer_service.jobs.events import JobState
from trainer_service.jobs.requests import TrainRequest

pytestmark = pytest.mark.slow


def test_with_an_empty_registry_it_starts_and_says_that_nothing_serves(system: System) -> None:
    with system.client() as client, pytest.raises(Unavailable, match="No version serves yet"):
        list(client.generate("Once"))
    assert "no version yet" in system.command("deploy.cli", "status").stdout
    assert "No version yet" in system.command("trainer_service", "checkpoints").stdout


def test_streams_survive_the_swaps_that_training_causes(system: System) -> None:
    events = system.finish(system.enqueue(max_steps="60", evaluation_interval="60"))
    # Of each: the version that answered, the version that served when the text was complete, and the ends.
    streams: list[tuple[int, int, list[inference_pb2.Finished]]] = []
    failures: list[BaseException] = []
    truths = 0
    done = threading.Event()

    def compare() -> None:
        """Compares the page with the list of versions if the list was the same before and after it."""
        nonlocal truths
        with AdminClient(f"127.0.0.1:{system.ports.inference}") as admin:
            while not done.is_set():
                listings = [admin.versions()]
                text, _ = system.scrape(system.ports.inference_metrics)
                listings.append(admin.versions())
                before, after = ({status.version: status.state for status in listing.versions} for listing in listings)
                if before == after:
                    truths += 1
                    assert serving_on(text) == {
                        version: state == inference_pb2.VERSION_STATE_SERVING
                        for version, state in before.items()
                        if state in (inference_pb2.VERSION_STATE_SERVING, inference_pb2.VERSION_STATE_RESIDENT)
                    }
                time.sleep(0.05)

    def stream() -> None:
        with system.client() as client:
            while not done.is_set():
                try:
                    events, tokens, serving = [], 0, 0
                    for event in client.generate("Once upon a time", ignore_eos=True, max_tokens=200):
                        events.append(event)
                        if isinstance(event, inference_pb2.Delta):
                            tokens += len(event.token_ids)
                            serving = client.model().version if tokens == 200 else 0
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

    readers = [threading.Thread(target=stream) for _ in range(32)] + [threading.Thread(target=compare)]
    for reader in readers:
        reader.start()
    try:
        # Streams of the first version are under way when training resumes.
        wait_until(lambda: bool(streams))
        events += system.finish(system.enqueue(resume=1, max_steps="240"))
        last = disk_registry(system.directories.registry).labels()["best"]
        with system.client() as client:
            wait_until(lambda: client.model().version == last and any(started == last for started, _, _ in streams))
        wait_until(lambda: truths > 10 or bool(failures))
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


def serving_on(page: str) -> dict[int, bool]:
    """Returns the versions in memory, and whether each serves."""
    return {
        int(sample.labels["version"]): sample.labels["serving"] == "true"
        for family in text_string_to_metric_families(page)
        if family.name == "gptloop_inference_model_info"
        for sample in family.samples
    }


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


def test_both_metrics_pages_count_the_work(system: System) -> None:
    trainer_text, trainer = system.scrape(system.ports.trainer_metrics)
    inference_text, inference = system.scrape(system.ports.inference_metrics)
    assert trainer["gptloop_training_tokens_total"] == 240 * 2 * 256
    assert trainer["gptloop_training_step"] == 240
    assert trainer["gptloop_training_jobs finished"] == 2
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
    with grpc.insecure_channel(f"127.0.0.1:{system.ports.trainer}") as channel:
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert "training.v1.TrainingService" in names and "grpc.health.v1.Health" in names


def test_a_finished_run_can_be_extended_and_its_tokens_are_added(system: System) -> None:
    before = system.scrape(system.ports.trainer_metrics)[1]["gptloop_training_tokens_total"]
    job = system.enqueue(resume=4, max_steps="270", evaluation_interval="30")
    events = system.finish(job)
    assert next(event.run_started for event in events if event.HasField("run_started")).first_step == 241
    assert system.scrape(system.ports.trainer_metrics)[1]["gptloop_training_tokens_total"] == before + 30 * 2 * 256
    assert disk_registry(system.directories.registry).version(5).parent == 4


def test_an_impossible_request_is_rejected_with_a_sentence(system: System) -> None:
    presets = "demo, small, tinystories-53m, tinystories-53m-plus, gpt2-124m"
    for request, kind, sentence in (
        (TrainRequest(preset="huge"), InvalidArgument, f"^Unknown preset 'huge'. The presets are {presets}.$"),
        (TrainRequest(overrides={"steps": "5"}), InvalidArgument, "steps"),
        (TrainRequest(dataset=("/nowhere/text.txt",)), NotFound, "/nowhere/text.txt"),
        (TrainRequest(resume=77), NotFound, "no version 77"),
        (TrainRequest(resume=4), InvalidArgument, "nothing is left to do.*max_steps=480"),
    ):
        with pytest.raises(kind, match=sentence):
            system.trainer.submit(request)


def test_a_text_shorter_than_one_context_is_rejected_before_a_job_is_queued(system: System, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time there was very little text.")
    ended = system.command(
        "trainer_service", "train", "--preset", "tinystories-53m", "--dataset", str(text), "--set", "batch_size=1"
    )
    assert ended.returncode == 1
    assert "of context_length 512 need at least 1,026 tokens" in ended.stderr and "Traceback" not in ended.stderr


def test_a_running_job_can_be_cancelled_and_keeps_its_state(system: System) -> None:
    job = system.enqueue(max_steps="100000", evaluation_interval="50000")
    system.watch(job, is_progress(5))
    with system.client() as client:
        stream = client.generate("Once upon a time", ignore_eos=True, max_tokens=200)
        assert isinstance(next(stream), inference_pb2.Started)
        trained = system.step(job)
        assert isinstance(list(stream)[-1], inference_pb2.Finished)
    # Training continues during a stream and after it.
    system.watch(job, is_progress(trained + 5))
    assert system.trainer.cancel(job).state == pb.JOB_STATE_CANCELLING
    events = system.watch(job, lambda event: event.state_changed.state == pb.JOB_STATE_CANCELLED)
    last = [event.progress.step for event in events if event.HasField("progress")][-1]
    run = system.trainer.job(job).run
    assert disk_registry(system.directories.registry).states(run) == [last]
    with pytest.raises(FailedPrecondition):
        system.trainer.cancel(job)


def test_a_loss_that_is_not_finite_fails_the_job_and_keeps_the_versions_before_it(system: System) -> None:
    registry = disk_registry(system.directories.registry)
    overflowing = publish_overflowing_version(registry, 5)
    versions = len(registry.versions())
    job = system.enqueue(resume=overflowing.version, max_steps="300")
    events = system.watch(job, lambda event: event.state_changed.state == pb.JOB_STATE_FAILED)
    assert "training diverged" in events[-1].state_changed.reason
    assert system.scrape(system.ports.trainer_metrics)[1]["gptloop_training_diverged_total"] == 1
    assert len(disk_registry(system.directories.registry).versions()) == versions


def test_jobs_can_be_listed_in_pages(system: System) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{system.ports.trainer}") as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        first = stub.ListJobs(pb.ListJobsRequest(page_size=2))
        rest = stub.ListJobs(pb.ListJobsRequest(page_token=first.next_page_token))
    ids = [job.id for page in (first, rest) for job in page.jobs]
    assert len(first.jobs) == 2 and len(ids) == len(set(ids)) >= 4 and not rest.next_page_token
    assert [job.id for job in system.trainer.jobs()] == ids
    (failed,) = system.trainer.jobs(states=[JobState.FAILED])
    assert failed.reason


def test_without_a_worker_a_job_waits_and_the_command_says_so(system: System) -> None:
    """Runs last, because it stops everything."""
    system.stack.down()
    ended = system.command("trainer_service", "train")
    assert ended.returncode == 1 and "gptloop up" in ended.stderr and "Traceback" not in ended.stderr
