"""Trains a BPE in a separate process, which can be stopped at any moment.

The library's code cannot be interrupted, and a thread that is inside it when Python exits aborts the whole process. The
process reads its text from a temporary file, whose position shows the progress, and writes the tokens to another one.
"""

import errno
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

from shared.errors import ResourceExhausted
from shared.gpt.tokenizer import PATTERN, Tokenizer, train_bpe
from trainer_service.child_process import describe_end
from trainer_service.text.background import INTERVAL_S

# Training on at most this much text takes less time than starting a process.
SHORT_CHARACTERS = 1 << 18
# The exit code of the process if the disk is full, which Python itself never uses.
DISK_FULL_EXIT_CODE = 28


def train_apart(
    texts: Iterable[str], vocabulary_size: int, folder: Path, tick: Callable[[int, int], None]
) -> Tokenizer:
    """Returns what `train_bpe` returns; calls `tick` with the bytes read so far and all bytes, several times a second.

    An exception from `tick` ends the training. Raises `OSError` if a temporary file in `folder` cannot be made or the
    disk is full, and `ResourceExhausted` if the process fails for another reason.
    """
    with tempfile.TemporaryFile(dir=folder) as text, tempfile.TemporaryFile(dir=folder) as tokens:
        for each in texts:
            tick(0, 0)
            text.write(json.dumps(each, ensure_ascii=False).encode() + b"\n")
        text.flush()
        total_bytes = text.tell()
        text.seek(0)
        module = "trainer_service.text.bpe_process"
        command = [sys.executable, "-m", module, str(vocabulary_size), str(os.getpid())]
        with subprocess.Popen(command, stdin=text, stdout=tokens, stderr=subprocess.PIPE) as process:
            try:
                while process.poll() is None:
                    # The process reads from the same open file, so both share its position.
                    tick(os.lseek(text.fileno(), 0, os.SEEK_CUR), total_bytes)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(INTERVAL_S)
            except BaseException:
                process.kill()
                raise
            assert process.stderr is not None
            stderr = process.stderr.read().decode(errors="replace")
        if process.returncode == DISK_FULL_EXIT_CODE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if process.returncode:
            raise ResourceExhausted(
                f"The tokenizer cannot be trained, because its process {describe_end(process.returncode, stderr)}"
            )
        tokens.seek(0)
        return Tokenizer("bpe", PATTERN, [bytes.fromhex(token) for token in json.load(tokens)])


def main() -> None:
    """Reads texts as lines of JSON from standard input, and writes the tokens to standard output."""
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    tokenizer = train_bpe(map(json.loads, sys.stdin.buffer), int(sys.argv[1]))
    try:
        json.dump([token.hex() for token in tokenizer.vocabulary[:-1]], sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Skips the flush at exit, which would fail again and change the exit code to 120.
        os._exit(DISK_FULL_EXIT_CODE)


def _end_with(parent: int) -> None:
    """Ends this process once its parent has died, because nobody waits for the tokens then."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
