import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from deploy.health import Health
from deploy.launch import holder
from deploy.ports import Ports, free_ports
from deploy.stack import Stack
from deploy.supervisor import ProcessState
from shared.errors import AlreadyExists, FailedPrecondition, StoreFailed, Unavailable
from shared.service.settings import Directories
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

_HEADER = """
[supervisord]
nodaemon=true
pidfile=run/supervisord.pid
logfile=log/supervisord.log
silent=true
[unix_http_server]
file=%(ENV_GPTLOOP_SUPERVISOR_SOCKET)s
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
_PROGRAM = """
[program:{name}]
command=/bin/sh -c 'cd "$GPTLOOP_ROOT" && exec "$GPTLOOP_PYTHON" -m deploy.launch "$GPTLOOP_VAR/run/{name}.lock" \
 "$GPTLOOP_PYTHON" "$GPTLOOP_VAR/../{name}.py"'
startsecs=0
startretries=1
redirect_stderr=true
stdout_logfile=log/{name}.log
"""
_WORKS = "import signal\nsignal.pause()\n"


class Fixture:
    """A stack of stand-in programs, named redis and worker; tests set the answer of their checks."""

    def __init__(self, folder: Path, **scripts: str) -> None:
        self.folder = folder
        self.ports = free_ports()
        self.health = Health(True, "fine")
        text = _HEADER
        for name, script in scripts.items():
            path = folder / f"{name}.py"
            path.write_text(script)
            text += _PROGRAM.format(name=name)
        self.configuration = folder / "supervisord.conf"
        self.configuration.write_text(text)
        self.names = tuple(scripts)

        self.stack = self.new_stack(self.ports)

    def new_stack(self, ports: Ports, check: Callable[[str], Health] | None = None) -> Stack:
        checks = {name: partial(check or self._check, name) for name in self.names}
        return Stack(Directories(self.folder / "var"), ports, os.environ, self.configuration, checks)

    def _check(self, name: str) -> Health:
        return self.health if holder(self.lock(name)) is not None else Health(False, "starts")

    def lock(self, name: str) -> Path:
        return self.folder / "var" / "run" / f"{name}.lock"

    def running(self) -> list[str]:
        """Returns the names of the programs that run, with a supervisor or without one."""
        return [name for name in ("supervisord", *self.names) if holder(self.lock(name)) is not None]


@pytest.fixture
def fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    fixture = Fixture(tmp_path, redis=_WORKS, worker=_WORKS)
    yield fixture
    fixture.stack.down()


def _ignore(_: str) -> None:
    pass


def _pids(stack: Stack) -> dict[str, int]:
    return {status.process.name: status.process.pid or 0 for status in stack.status() or []}


def test_up_returns_when_all_is_healthy_and_down_ends_all(fixture: Fixture) -> None:
    stack = fixture.stack
    stack.up(_ignore)
    pids = _pids(stack)
    assert set(pids) == {"redis", "worker"}
    assert all(status.is_healthy for status in stack.status() or [])
    assert fixture.running() == ["supervisord", "redis", "worker"]
    assert stack.down()
    assert fixture.running() == []
    assert stack.status() is None
    assert not stack.down()


def test_up_names_every_process_that_it_starts(fixture: Fixture) -> None:
    reports: list[str] = []
    assert fixture.stack.up(reports.append) == "Everything is up."
    assert reports == ["Starting redis.", "Starting worker."]


def test_up_waits_for_health_without_alarm(fixture: Fixture) -> None:
    asked: list[str] = []
    reports: list[str] = []

    def check(name: str) -> Health:
        asked.append(name)
        return Health(len(asked) > 3, "no answer: Error 2")

    stack = fixture.new_stack(fixture.ports, check)
    outcome = stack.up(reports.append)
    stack.down()
    assert outcome == "Everything is up."
    assert asked == ["redis"] * 4 + ["worker"]
    assert reports == ["Starting redis.", "Starting worker."]


def test_up_again_starts_nothing(fixture: Fixture) -> None:
    fixture.stack.up(_ignore)
    before = _pids(fixture.stack)
    reports: list[str] = []
    outcome = fixture.stack.up(reports.append)
    assert outcome == "Everything is up already. New settings apply after `gptloop down` and `gptloop up`."
    assert not reports
    assert _pids(fixture.stack) == before


def test_up_names_an_unhealthy_process_of_a_running_stack(fixture: Fixture) -> None:
    fixture.stack.up(_ignore)
    fixture.health = Health(False, "no answer")
    with pytest.raises(FailedPrecondition, match="redis is not healthy"):
        fixture.stack.up(_ignore)
    assert fixture.stack.status()


def test_a_process_that_dies_is_started_again(fixture: Fixture) -> None:
    stack = fixture.stack
    stack.up(_ignore)
    killed = _pids(stack)["worker"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: _pids(stack)["worker"] not in (killed, 0))


def test_a_process_that_does_not_start_is_named_with_its_log_and_nothing_is_left_running(
    tmp_path: Path, fixture: Fixture
) -> None:
    (tmp_path / "worker.py").write_text("import sys\nsys.exit('error: the reason')\n")
    text = fixture.configuration.read_text().replace("startsecs=0", "startsecs=1")
    fixture.configuration.write_text(text)
    with pytest.raises(Unavailable, match=r"worker ends again and again[\s\S]*error: the reason"):
        fixture.stack.up(_ignore)
    assert fixture.running() == []


def test_up_ends_at_once_with_the_reason_if_waiting_cannot_help(fixture: Fixture) -> None:
    fixture.health = Health(False, "The certificate is for another name.", needs_change=True)
    with pytest.raises(
        FailedPrecondition,
        match=r"^redis cannot be used, so everything was stopped\. The certificate is for another name\.$",
    ):
        fixture.stack.up(_ignore)
    assert fixture.running() == []


def test_nothing_is_started_for_a_registry_that_is_away(fixture: Fixture) -> None:
    registry = fixture.folder / "var" / "registry"
    registry.parent.mkdir(parents=True, exist_ok=True)
    registry.symlink_to(fixture.folder / "absent")
    with pytest.raises(StoreFailed, match=r"registry is a link to .*absent, which cannot be followed"):
        fixture.stack.up(_ignore)
    assert fixture.running() == []


def test_a_bad_configuration_is_reported(fixture: Fixture) -> None:
    fixture.configuration.write_text("[supervisord]\nnodaemon=perhaps\n")
    with pytest.raises(Unavailable, match="perhaps"):
        fixture.stack.up(_ignore)
    assert fixture.stack.status() is None


def test_an_interrupted_up_leaves_nothing_running(fixture: Fixture) -> None:
    fixture.health = Health(False, "never")
    pids: dict[str, int] = {}

    def interrupt(_: str) -> None:
        pids.update(_pids(fixture.stack))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fixture.stack.up(interrupt)
    assert pids
    assert fixture.running() == []


def _kill_supervisor(fixture: Fixture) -> dict[str, int]:
    fixture.stack.up(_ignore)
    pids = _pids(fixture.stack)
    os.kill(int(fixture.lock("supervisord").read_text()), signal.SIGKILL)
    wait_until(lambda: "supervisord" not in fixture.running())
    return pids


def test_programs_of_a_killed_supervisor_are_named_and_ended(fixture: Fixture) -> None:
    pids = _kill_supervisor(fixture)
    with pytest.raises(Unavailable, match=rf"worker \(pid {pids['worker']}\)"):
        fixture.stack.status()
    assert fixture.stack.down()
    assert fixture.running() == []


def test_up_replaces_the_programs_of_a_killed_supervisor(fixture: Fixture) -> None:
    old = _kill_supervisor(fixture)
    fixture.stack.up(_ignore)
    assert fixture.running() == ["supervisord", "redis", "worker"]
    new = _pids(fixture.stack)
    assert all(new[name] != old[name] for name in ("redis", "worker"))


def test_two_commands_at_once_are_refused(fixture: Fixture) -> None:
    def report(_: str) -> None:
        with pytest.raises(FailedPrecondition, match="at work"):
            fixture.new_stack(fixture.ports).down()

    fixture.stack.up(report)


def test_a_port_in_use_is_named_with_its_variable(fixture: Fixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ports = replace(fixture.ports, inference_metrics=port)
        with pytest.raises(AlreadyExists) as caught:
            fixture.new_stack(ports).up(_ignore)
    assert f"Port {port} of 127.0.0.1 is in use" in str(caught.value)
    assert "GPTLOOP_INFERENCE_METRICS_PORT" in str(caught.value)
    assert fixture.stack.status() is None


def test_an_external_redis_is_checked_but_not_started(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    text = fixture.configuration.read_text().replace(
        "[program:redis]", "[program:redis]\nautostart=%(ENV_GPTLOOP_EMBEDDED_REDIS)s"
    )
    fixture.configuration.write_text(text)
    stack = fixture.new_stack(fixture.ports, lambda name: Health(True, "fine"))
    stack.up(_ignore)
    redis, worker = stack.status() or []
    stack.down()
    assert redis.process == ProcessState("redis", "external")
    assert redis.is_healthy
    assert worker.process.state == "RUNNING"
