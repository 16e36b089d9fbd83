import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from deploy.log_file import append
from tests.waiting import HANG_S, wait_until
from tests.workplace import PROJECT

_BOTH_STREAMS = "import sys; print('out', flush=True); print('error', file=sys.stderr, flush=True)"
# Ends, and leaves a process in a group of its own behind, which prints at once and after a byte on its input.
_LEAVES_ONE_BEHIND = """
import os
if os.fork() == 0:
    os.setsid()
    os.write(1, b"first ")
    os.read(0, 1)
    os.write(1, b"late")
"""


def _launched(log: Path, script: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deploy.log_file", str(log), sys.executable, "-c", script]
    return subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def test_a_full_log_is_renamed_and_three_old_ones_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    for number in range(6):
        append(f"{number}\n".encode() * 5, log, max_bytes=10)
    texts = {path.name: path.read_text()[0] for path in tmp_path.iterdir()}
    assert texts == {"trainer.log": "5", "trainer.log.1": "4", "trainer.log.2": "3", "trainer.log.3": "2"}
    append(b"6", log, max_bytes=11)
    assert log.read_text() == "5\n" * 5 + "6"


def test_a_disk_that_fails_costs_lines_only(tmp_path: Path) -> None:
    log = tmp_path / "folder" / "trainer.log"
    append(b"lost", log)
    log.parent.mkdir()
    append(b"kept", log)
    assert log.read_text() == "kept"


@pytest.mark.slow
def test_everything_that_a_program_prints_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "new" / "ü %d.log"
    program = _launched(log, _BOTH_STREAMS)
    printed, _ = program.communicate(timeout=HANG_S)
    assert (program.returncode, printed) == (0, b"")
    wait_until(lambda: log.exists() and log.read_text() == "out\nerror\n")


@pytest.mark.slow
def test_the_program_has_the_pid_of_the_command_and_gets_its_signals(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = _launched(log, "import os, signal; print(os.getpid(), flush=True); signal.pause()")
    wait_until(lambda: log.exists() and log.read_text() == f"{program.pid}\n")
    program.send_signal(signal.SIGTERM)
    assert program.wait(HANG_S) == -signal.SIGTERM
    program.communicate()


@pytest.mark.slow
def test_what_a_process_prints_after_the_end_of_the_program_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = _launched(log, _LEAVES_ONE_BEHIND)
    assert program.wait(HANG_S) == 0
    wait_until(lambda: log.exists() and log.read_text() == "first ")
    # launchd kills what is left of the process group of a program that has ended.
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.communicate(b"x")
    wait_until(lambda: log.read_text() == "first late", hang_s=60.0)
