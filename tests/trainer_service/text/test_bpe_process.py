import errno
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shared.errors import ResourceExhausted
from shared.gpt.tokenizer import Tokenizer, train_bpe
from tests.end_to_end.conftest import is_gone
from tests.waiting import wait_until
from trainer_service.text.bpe_process import train_apart

PROJECT = Path(__file__).parents[3]
TEXTS = ["some words and some more words"] * 50
# A parent whose child never ends, because no text arrives.
PARENT = """
import os, subprocess, sys
command = [sys.executable, "-m", "trainer_service.text.bpe_process", "300", str(os.getpid())]
process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
print(process.pid, flush=True)
process.wait()
"""


def train(folder: Path) -> Tokenizer:
    return train_apart(TEXTS, 280, folder, lambda *_: None)


def test_the_process_trains_the_same_tokenizer(tmp_path: Path) -> None:
    assert train(tmp_path).digest == train_bpe(TEXTS, 280).digest
    assert not list(tmp_path.iterdir())


def test_the_process_ends_when_its_parent_dies() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        # The child's standard input is still open, because this process holds the other end.
        wait_until(lambda: is_gone(child))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "ended with exit code 3."),
        ("echo Traceback >&2; echo 'MemoryError: no' >&2; exit 1", "ended with exit code 1: 'MemoryError: no'."),
        ("kill -9 $$", "was killed by SIGKILL, perhaps because memory is short."),
        ("kill -11 $$", "was killed by signal 11."),
    ],
)
def test_the_error_for_a_failed_process_says_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\n{script}\n")
    executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    with pytest.raises(ResourceExhausted) as raised:
        train(tmp_path)
    assert str(raised.value) == f"The tokenizer cannot be trained, because its process {reason}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="This system has no /dev/full.")
def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # the child must buffer its output, as it usually does
    with tempfile.TemporaryFile(dir=tmp_path) as text, Path("/dev/full").open("r+b", buffering=0) as tokens:
        files = [text, tokens]
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: files.pop(0))
        with pytest.raises(OSError, match="No space left on device") as raised:
            train(tmp_path)
    assert raised.value.errno == errno.ENOSPC
