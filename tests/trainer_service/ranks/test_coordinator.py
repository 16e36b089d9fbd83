"""The coordinator of ranks, with small programs in place of ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import is_gone
from tests.waiting import wait_until
from trainer_service.ranks import coordinator
from trainer_service.ranks.coordinator import Command, commands, run_ranks
from trainer_service.ranks.place import find_place

pytestmark = pytest.mark.slow

# Runs until it is killed.
FOREVER = "import signal; signal.pause()"


def program(name: str, text: str) -> Command:
    return Command(name, [sys.executable, "-c", text], os.environ)


def never() -> bool:
    return False


def run(*texts: str, stop_requested: Callable[[], bool] = never, orphaned: Callable[[], bool] = never) -> str:
    programs = [program(f"Rank {rank}", text) for rank, text in enumerate(texts)]
    return run_ranks(programs, stop_requested, orphaned)


def test_ranks_that_end_well_leave_no_reason() -> None:
    assert run("", "", "") == ""


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    note = f"import os; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); "
    killed = f"{note}os.kill(os.getpid(), 9)"
    assert run(note + FOREVER, killed) == "Rank 1 was killed by SIGKILL, perhaps because memory is short"
    assert all(is_gone(int(pid)) for pid in pids.read_text().split())


def test_the_sentence_of_a_rank_is_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    failing = "import sys; print('The text is damaged.'); print('some log', file=sys.stderr); sys.exit(1)"
    assert run(FOREVER, failing) == "Rank 1: The text is damaged"
    assert capfd.readouterr().err == "some log\n"


def test_the_last_line_is_the_reason_of_a_rank_that_says_nothing() -> None:
    reason = run(FOREVER, "import sys; print('no such host\\n-----', file=sys.stderr); sys.exit(3)")
    assert reason == "Rank 1 ended with exit code 3: 'no such host'"


def test_a_rank_that_was_killed_comes_before_those_that_lost_it() -> None:
    # Both end before the coordinator looks.
    lost = "import sys; print('I lost a rank.'); sys.exit(75)"
    programs = [program("Rank 0", lost), program("Rank 1", "import os; os.kill(os.getpid(), 9)")]
    with coordinator._Group() as group:
        for each in programs:
            group.start(each)
        for member in group._members:
            os.waitid(os.P_PID, member.process.pid, os.WEXITED | os.WNOWAIT)
        group.take_turn()
        assert group.failure.startswith("Rank 1 was killed")


def test_ranks_that_outlive_rank_0_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "_LAST_LIMIT_S", 0.1)
    assert run("", FOREVER) == ""


def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    saving = (
        "import pathlib, signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); pathlib.Path({str(ready)!r}).touch()\n" + FOREVER
    )
    assert run(saving, stop_requested=ready.exists) == ""


def test_ranks_that_do_not_end_after_the_worker_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "_ORPHAN_LIMIT_S", 0.1)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()"
    assert run(stubborn, orphaned=lambda: True) in ("The worker was killed", "Rank 0 was killed by signal 15")


def test_a_missing_launcher_is_named() -> None:
    launcher = Command("The launcher", ["/no/such/mpirun", "-n", "2"], os.environ)
    reason = run_ranks([launcher], never, never)
    assert reason == "The launcher '/no/such/mpirun' cannot be started: No such file or directory"


def test_a_launcher_that_fails_says_why() -> None:
    text = "import sys; print('----\\nAll nodes are busy.\\n----', file=sys.stderr); sys.exit(1)"
    reason = run_ranks([program("The launcher", text)], never, never)
    assert reason == "The launcher ended with exit code 1: 'All nodes are busy.'"


def test_the_launcher_gets_the_number_of_ranks_and_the_command_of_a_rank() -> None:
    (command,) = commands("ab12", 3, 4, ("mpirun", "-n", "{world_size}"), {"A": "b"}, ())
    rank = (sys.executable, "-m", "trainer_service", "rank", "ab12", "3")
    assert command == Command("The launcher", ["mpirun", "-n", "4", *rank], {"A": "b"})


def test_local_ranks_share_the_cores_and_know_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "cpu_threads", lambda: 5)
    made = commands("ab12", 1, 2, (), {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "9"}, ())
    places = [find_place(command.environment) for command in made]
    assert [(place.rank, place.count, place.local_rank) for place in places] == [(0, 2, None), (1, 2, None)]
    assert places[0].meeting == places[1].meeting
    assert [command.environment["OMP_NUM_THREADS"] for command in made] == ["2", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in made[0].environment


@pytest.mark.parametrize(("gpus", "seen"), [(("4", "7"), ["4", "7"]), (("4",), ["", ""])])
def test_local_ranks_take_a_gpu_each_if_there_are_enough(gpus: tuple[str, ...], seen: list[str]) -> None:
    made = commands("ab12", 1, 2, (), {}, gpus)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in made] == seen


def test_ranks_end_with_their_coordinator(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    rank = f"import os, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); {FOREVER}"
    reader = "from shared.service.reader import end_without_reader; end_without_reader(); "
    text = (
        "import os, sys; from trainer_service.ranks.coordinator import Command, run_ranks\n"
        f"command = Command('Rank 0', [sys.executable, '-c', {reader + rank!r}], os.environ)\n"
        "run_ranks([command], bool, bool)"
    )
    process = subprocess.Popen([sys.executable, "-c", text])
    wait_until(lambda: pid.exists() and bool(pid.read_text()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: is_gone(int(pid.read_text())))
