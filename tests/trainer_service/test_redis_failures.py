"""What users see when Redis fails under a real worker and its training process: rows of `deploy/redis/README.md`.

All of it talks to Redis by TLS, with the rights of `deploy/redis/users.acl` and a password from a file.
"""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from redis import Redis
from rich.console import Console
from typer.testing import CliRunner

from shared.errors import NotFound, Unavailable
from shared.registry.registry import Registry
from shared.service.listening import free_port_numbers
from shared.service.settings import Directories
from tests.certificates import Authority
from tests.redis_process import PASSWORD, PROJECT, RedisServer
from tests.redis_relay import Relay
from tests.registries import disk_registry, registry_id
from tests.trainer_service.site import TINY_RUN, Site
from tests.waiting import wait_until
from trainer_service.commands.jobs import app
from trainer_service.follow import follow
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest
from trainer_service.metrics import make_metrics
from trainer_service.redis_client import connect, read_redis

pytestmark = pytest.mark.slow


@dataclass
class System:
    """A worker at a long run, and a Redis behind a relay."""

    redis: RedisServer
    relay: Relay
    authority: Authority
    password: Path
    environment: dict[str, str]
    log: Path
    queue: JobQueue = field(init=False)
    job: str = ""
    watchers: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        directories = Directories(Path(self.environment["GPTLOOP_VAR"]))
        self.directories = directories
        self.queue = JobQueue(connect(read_redis(self.environment, directories)), registry_id(directories.registry))

    @property
    def registry(self) -> Registry:
        return disk_registry(self.directories.registry)

    def step(self) -> int:
        """Returns the last step that the run has reported."""
        progress = self.queue.store.get(self.job).progress
        return progress.step if progress else 0

    def check_goes_on(self) -> None:
        """Waits until the run reports further steps, and checks that its first attempt still runs."""
        before = self.step()
        wait_until(lambda: self.step() > before)
        record = self.queue.store.get(self.job)
        assert (record.state, record.attempt) == (JobState.RUNNING, 1)
        wait_until(lambda: self.queue.store.workers.count() == 1)

    def written(self) -> int:
        """Returns the last step of which the run has written a state."""
        return max(self.registry.states(self.registry.runs()[0]), default=0)

    def check_trains(self) -> None:
        """Waits until the training process writes another state, which needs no Redis."""
        before = self.written()
        wait_until(lambda: self.written() > before)

    def sentence(self, *words: str) -> str:
        """Returns the sentence with which a command fails."""
        ended = CliRunner().invoke(app, words, env=self.environment)
        assert isinstance(ended.exception, Unavailable), ended
        return str(ended.exception)

    def sees_redis(self) -> bool:
        return bool(make_metrics(self.queue, self.registry).get_sample_value("gptloop_training_redis_up"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("failures")
    redis = RedisServer(tmp_path_factory.mktemp("redis"), free_port_numbers(1)[0])
    authority = Authority(folder / "authority")
    relay = Relay(redis.socket, authority.issue("localhost"))
    password = folder / "password"
    password.write_text(f"{PASSWORD}\n")
    site = Site(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GPTLOOP_")} | {
        "GPTLOOP_VAR": str(site.directories.var),
        "REDIS_URL": f"rediss://gptloop@localhost:{relay.port}/0?ssl_ca_certs={quote(str(authority.file))}",
        "GPTLOOP_REDIS_PASSWORD_FILE": str(password),
    }
    log = folder / "log"
    system = System(redis, relay, authority, password, environment, log)
    values = TINY_RUN | {"max_steps": "1000000", "evaluation_interval": "200", "report_interval": "20"}
    spec = TrainRequest(dataset=(site.text,), overrides=values).resolve(site.registry)
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "trainer_service", "work"], cwd=PROJECT, env=environment, stderr=output
        )
    try:
        system.job = system.queue.enqueue(spec).id
        wait_until(lambda: system.step() > 0, lost=lambda: worker.poll() is not None)
        yield system
    finally:
        worker.terminate()
        worker.wait()
        # Whoever still follows the run sees that it is gone.
        redis.admin().flushall()
        for watcher in system.watchers:
            watcher.join()
        relay.end()
        system.queue.store.redis.close()
        redis.end()


@pytest.fixture
def admin(system: System) -> Iterator[Redis]:
    with system.redis.admin() as client:
        yield client


def test_a_run_goes_on_while_redis_is_killed_and_started_again(system: System) -> None:
    output = io.StringIO()
    system.watchers.append(threading.Thread(target=_follow, args=(system, Console(file=output)), daemon=True))
    system.watchers[-1].start()
    wait_until(lambda: "step" in output.getvalue())
    system.redis.kill()
    assert system.sentence("jobs").startswith("Redis does not answer (") and not system.sees_redis()
    wait_until(lambda: "The job may continue; its events follow when Redis answers." in output.getvalue())
    system.check_trains()
    system.redis.start()
    wait_until(lambda: "Redis answers again." in output.getvalue())
    system.check_goes_on()
    assert system.sees_redis()


def _follow(system: System, console: Console) -> None:
    queue = JobQueue(connect(read_redis(system.environment, system.directories)), system.queue.registry)
    try:
        with suppress(Unavailable, NotFound):
            follow(queue, system.job, console)
    finally:
        queue.store.redis.close()


def test_a_run_goes_on_while_redis_is_full(system: System, admin: Redis) -> None:
    admin.config_set("maxmemory", 1)
    assert system.sentence("train", "--no-follow") == (
        "Redis is out of memory: raise its maxmemory, or remove other data from it."
    )
    # What only reads is still answered.
    assert CliRunner().invoke(app, ["jobs"], env=system.environment).exit_code == 0 and system.sees_redis()
    system.check_trains()
    admin.config_set("maxmemory", 0)
    system.check_goes_on()


def test_a_run_goes_on_while_redis_is_stopped(system: System) -> None:
    system.redis.pause(True)
    assert system.sentence("jobs") == "Redis does not answer within 5 s: it is stopped, blocked or far."
    assert not system.sees_redis()
    system.check_trains()
    system.redis.pause(False)
    system.check_goes_on()


def test_a_new_password_needs_no_restart(system: System, admin: Redis) -> None:
    admin.execute_command("ACL", "SETUSER", "gptloop", "resetpass", ">the next password")
    admin.execute_command("CLIENT", "KILL", "USER", "gptloop")
    assert system.sentence("jobs").startswith(
        "Redis refuses the name or the password of REDIS_URL and GPTLOOP_REDIS_PASSWORD_FILE (invalid username-password"
    )
    system.check_trains()
    system.password.write_text("the next password\n")
    system.check_goes_on()


def test_a_run_goes_on_while_the_certificate_of_redis_has_expired(system: System) -> None:
    system.relay.show(system.authority.issue("localhost", expired=True))
    system.relay.cut()
    assert system.sentence("jobs") == (
        "The certificate of Redis is refused (certificate has expired): renew it, or correct ssl_ca_certs in REDIS_URL."
    )
    system.check_trains()
    system.relay.show(system.authority.issue("localhost"))
    system.check_goes_on()


def test_a_run_goes_on_after_a_failover_to_a_replica(
    system: System, admin: Redis, tmp_path_factory: pytest.TempPathFactory
) -> None:
    replica = RedisServer(tmp_path_factory.mktemp("replica"), free_port_numbers(1)[0])
    try:
        with replica.admin() as other:
            other.execute_command("ACL", "SETUSER", "gptloop", "resetpass", ">the next password")
            for client in (admin, other):
                client.config_set("masteruser", "admin")
                client.config_set("masterauth", "admin")
            other.replicaof("127.0.0.1", system.redis.port)
            wait_until(lambda: _replication(other)["master_link_status"] == "up")
            system.relay.target = replica.socket
            # The connections to the old primary stay open, and it refuses to write.
            other.replicaof("NO", "ONE")
            admin.replicaof("127.0.0.1", replica.port)
            system.check_goes_on()
            assert _replication(other)["role"] == "master"
            # And back.
            wait_until(lambda: _replication(admin)["master_link_status"] == "up")
            system.relay.target = system.redis.socket
            admin.replicaof("NO", "ONE")
            other.replicaof("127.0.0.1", system.redis.port)
            system.check_goes_on()
    finally:
        replica.end()


def _replication(client: Redis) -> dict[str, Any]:
    found: Any = client.info("replication")
    return dict(found)


def test_a_run_ends_with_its_state_if_an_empty_redis_replaces_its_own(system: System, admin: Redis) -> None:
    (run,) = system.registry.runs()
    process = _process(system)
    admin.flushall()
    ended = CliRunner().invoke(app, ["watch", system.job], env=system.environment)
    assert isinstance(ended.exception, NotFound) and "There is no job" in str(ended.exception)
    wait_until(lambda: not Path(f"/proc/{process}").exists())
    assert "There is no job" in system.log.read_text()
    state = system.registry.states(run)[-1]
    system.registry.verified_state(run, state)
    # The worker waits for the next job, also while its Redis is a replica for a moment.
    admin.replicaof("127.0.0.1", 1)
    wait_until(lambda: "the worker waits: Redis" in system.log.read_text())
    admin.replicaof("NO", "ONE")
    best = system.registry.versions()[-1].version
    spec = TrainRequest(resume=best, overrides={"max_steps": "1000000"}).resolve(system.registry)
    system.job = system.queue.enqueue(spec).id
    system.check_goes_on()


def _process(system: System) -> int:
    found = subprocess.run(["pgrep", "-f", f"job_process {system.job}"], capture_output=True, text=True)
    return int(found.stdout.split()[0])


def test_no_log_and_no_list_of_processes_shows_a_password(system: System) -> None:
    processes = subprocess.run(["ps", "axww", "-o", "args="], capture_output=True, text=True).stdout
    log, address = system.log.read_text(), read_redis(system.environment, system.directories)
    for secret in (PASSWORD, "the next password"):
        assert secret not in log + processes + repr(system.queue.store.redis) + repr(address)
    assert "Traceback" not in log
