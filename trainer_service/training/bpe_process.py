"""Trains a BPE in a process of its own, which can be ended at any moment.

The library's code cannot be interrupted, and a thread that is in it when Python ends takes the whole process down.
The text goes through a temporary file, whose position says how far the training is; the tokens come back the same way.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from shared.errors import ResourceExhausted, shown
from shared.gpt.tokenizer import PATTERN, Tokenizer, train_bpe
from trainer_service.training.background import INTERVAL_S

# Text as short as this is learned from faster than a process starts.
SHORT_CHARACTERS = 1 << 18


def train_apart(
    texts: Iterable[str], vocabulary_size: int, folder: Path, tick: Callable[[int, int], None]
) -> Tokenizer:
    """What `train_bpe` returns; calls `tick` with the bytes that were taken and all bytes, several times a second.

    What `tick` raises ends the training. Temporary files are made in `folder`; raises `OSError` if they cannot be, and
    `ResourceExhausted` if the process does not come to its end.
    """
    with tempfile.TemporaryFile(dir=folder) as text, tempfile.TemporaryFile(dir=folder) as found:
        for each in texts:
            tick(0, 0)
            text.write(json.dumps(each, ensure_ascii=False).encode() + b"\n")
        text.flush()
        total_bytes = text.tell()
        text.seek(0)
        module = "trainer_service.training.bpe_process"
        command = [sys.executable, "-m", module, str(vocabulary_size), str(os.getpid())]
        with subprocess.Popen(command, stdin=text, stdout=found, stderr=subprocess.PIPE) as process:
            try:
                while process.poll() is None:
                    # The process reads through the same open file.
                    tick(os.lseek(text.fileno(), 0, os.SEEK_CUR), total_bytes)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(INTERVAL_S)
            except BaseException:
                process.kill()
                raise
            assert process.stderr is not None
            said = process.stderr.read().decode(errors="replace")
        if process.returncode < 0:
            raise ResourceExhausted(
                f"The training of the tokenizer was killed by signal {-process.returncode}; memory may be short."
            )
        if process.returncode:
            last = (said.strip() or "it said nothing").splitlines()[-1]
            raise ResourceExhausted(f"The tokenizer could not be trained: {shown(last, 160)}. Is the disk full?")
        found.seek(0)
        return Tokenizer("bpe", PATTERN, [bytes.fromhex(piece) for piece in json.load(found)])


def main() -> None:
    """What the process does: text as JSON, a line each, from standard input; the tokens to standard output."""
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    tokenizer = train_bpe(map(json.loads, sys.stdin.buffer), int(sys.argv[1]))
    json.dump([piece.hex() for piece in tokenizer.pieces[:-1]], sys.stdout)


def _end_with(parent: int) -> None:
    """Ends this process when another one has started to look after it: nobody waits for the tokens any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
