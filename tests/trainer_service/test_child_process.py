import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from tests.end_to_end.conftest import is_gone
from tests.waiting import wait_until
from tests.workplace import PROJECT
from trainer_service.child_process import last_line

SHELL = ("/bin/sh", "-c")
# Writes its pid to a file, then never ends by itself.
CHILD = """
import os, pathlib, sys, threading
from shared.service.reader import end_without_reader
end_without_reader()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
print("ready", flush=True)
threading.Event().wait()
"""
# Starts one and prints a line once it runs.
PARENT = """
import sys
from trainer_service.child_process import last_line
last_line([sys.executable, "-c", *sys.argv[1:]], {}, lambda lines: lines and print("ready", flush=True), "")
"""


class Cancelled(Exception):
    pass


def test_the_last_line_is_returned_and_the_number_of_lines_is_reported() -> None:
    seen: list[int] = []
    script = 'echo one; echo two; echo "$WORD"; exec >&-; sleep 0.3'
    assert last_line((*SHELL, script), {"WORD": "three"}, seen.append, "") == "three\n"
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 3


def test_an_exception_of_the_caller_ends_the_process(tmp_path: Path) -> None:
    def tick(lines: int) -> None:
        if lines:
            raise Cancelled

    with pytest.raises(Cancelled):
        last_line((*SHELL, 'echo $$ > "$PLACE"; echo ready; exec sleep 1000'), {"PLACE": f"{tmp_path}/pid"}, tick, "")
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_the_process_ends_when_its_parent_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "pid")]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGKILL)
        child = int((tmp_path / "pid").read_text())
        wait_until(lambda: is_gone(child))


def test_a_signal_to_the_group_does_not_reach_the_process(tmp_path: Path) -> None:
    group = last_line((*SHELL, "ps -o pgid= -p $$"), {}, lambda _: None, "")
    assert int(group) != os.getpgrp()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "ended with exit code 3."),
        ("echo 'error: there is no compiler.' >&2; exit 1", "ended with exit code 1: 'error: there is no compiler.'."),
        ("head -c 300000 /dev/zero | tr '\\0' x >&2; echo >&2; echo no >&2; exit 1", "ended with exit code 1: 'no'."),
        ("kill -9 $$", "was killed by SIGKILL, perhaps because memory is short."),
    ],
)
def test_the_error_for_a_failed_process_says_what_is_known(script: str, reason: str) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        last_line((*SHELL, script), {}, lambda _: None, "The speed cannot be measured")
    assert str(raised.value) == f"The speed cannot be measured, because its process {reason}"
