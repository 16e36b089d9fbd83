"""What deploy/failures.md says of processes and of the registry: real processes, real signals."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from inference_service.client import InferenceClient
from shared.errors import Unavailable
from shared.pb.training.v1 import training_pb2 as pb
from shared.service.settings import Directories
from tests.end_to_end.conftest import System, is_progress, running
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

# More than the server needs to start again.
_RETRIES = 100


def _text(client: InferenceClient, version: int | None = None) -> str:
    return "".join(client.generate("Once", seed=7, version=version, ignore_eos=True, max_tokens=50).text())


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The system with a link in the place of its registry, which can be replaced at once."""
    directories = Directories(tmp_path_factory.mktemp("system"))
    _link_to(directories.var / "files", directories.registry)
    (directories.var / "files").mkdir()
    with running(directories) as everything:
        yield everything


def _link_to(target: Path, link: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(target)
    new.replace(link)


@pytest.fixture(scope="module")
def serving(system: System) -> System:
    """The system with a version that serves."""
    system.finish(system.enqueue(max_steps="20", evaluation_interval="20"))
    with system.client() as client:

        def serves() -> bool:
            with suppress(Unavailable):
                return bool(_text(client))
            return False

        wait_until(serves)
    return system


def _begin(system: System) -> str:
    """Returns a job that is under way, is evaluated often, and does not end by itself."""
    job = system.enqueue(max_steps="100000", evaluation_interval="50")
    system.watch(job, is_progress(10))
    return job


def _cancel(system: System, job: str) -> pb.Job:
    system.trainer.cancel(job)
    return system.end(job)


def test_a_call_to_a_killed_server_is_answered_by_the_next_one_as_it_would_have_been(serving: System) -> None:
    old = serving.pid("inference")
    with InferenceClient(f"127.0.0.1:{serving.ports.inference}", retries=_RETRIES) as client:
        before = _text(client)
        answers: list[str] = []
        # The call is on its way when the server dies.
        os.kill(old, signal.SIGSTOP)
        caller = threading.Thread(target=lambda: answers.append(_text(client)))
        caller.start()
        os.kill(old, signal.SIGKILL)
        caller.join()
    assert answers == [before]
    assert serving.pid("inference") != old


def test_a_run_does_not_notice_the_death_of_the_trainers_api(serving: System) -> None:
    job = _begin(serving)
    old = serving.pid("trainer")
    os.kill(old, signal.SIGKILL)
    serving.advance(job, 20)

    def answers() -> bool:
        with suppress(Unavailable):
            return bool(serving.trainer.job(job).id)
        return False

    wait_until(answers)
    ended = _cancel(serving, job)
    assert serving.pid("trainer") != old
    assert (ended.state, ended.attempt) == (pb.JOB_STATE_CANCELLED, 1)


def test_while_the_registry_cannot_be_read_the_loaded_version_serves_and_training_goes_on(serving: System) -> None:
    root = serving.directories.registry
    job = _begin(serving)
    newest = max(version.version for version in serving.registry.versions())
    with serving.client() as client:
        serves = client.model().version
        before = _text(client, serves)
        files = root.resolve()
        # Like a file system that is gone, a link to itself refuses every operation.
        _link_to(root, root)
        try:
            serving.advance(job, 100)
            assert _text(client, serves) == before
        finally:
            _link_to(files, root)
    wait_until(lambda: max(version.version for version in serving.registry.versions()) > newest + 1)
    ended = _cancel(serving, job)
    assert (ended.state, ended.attempt) == (pb.JOB_STATE_CANCELLED, 1)


def test_an_attempt_that_is_lost_while_the_registry_is_away_is_followed_once_it_is_back(serving: System) -> None:
    root, log = serving.directories.registry, serving.directories.var / "log" / "worker.log"
    job = _begin(serving)
    files = root.resolve()
    before = log.read_text()
    _link_to(root.with_name("absent"), root)
    try:
        wait_until(lambda: "the worker takes no job: " in log.read_text().removeprefix(before))
        os.kill(serving.training_process(), signal.SIGKILL)
        wait_until(lambda: serving.queue.store.get(job).is_ready)
    finally:
        _link_to(files, root)
    serving.advance(job, 20)
    ended = _cancel(serving, job)
    assert (ended.state, ended.attempt) == (pb.JOB_STATE_CANCELLED, 2)
    assert "Traceback" not in log.read_text().removeprefix(before)
