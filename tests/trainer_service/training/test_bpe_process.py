import signal
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.conftest import is_gone
from tests.waiting import wait_until

PROJECT = Path(__file__).parents[3]
# A process that looks after a training which never ends, as nothing comes of its text.
PARENT = """
import os, subprocess, sys
command = [sys.executable, "-m", "trainer_service.training.bpe_process", "300", str(os.getpid())]
process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
print(process.pid, flush=True)
process.wait()
"""


def test_a_training_ends_when_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        # Its text has not ended: this process holds the other end.
        wait_until(lambda: is_gone(child))
