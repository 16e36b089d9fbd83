"""Ends a process when nobody reads its output any more, so that it never outlives the process that started it."""

import os
import select
import stat
import threading

_STDOUT = 1


def end_without_reader() -> None:
    """Ends this process at once, with code 1, when the last reader of its standard output has gone.

    Does nothing if standard output is not a pipe.
    """
    if not stat.S_ISFIFO(os.fstat(_STDOUT).st_mode):
        return
    poll = select.poll()
    # Errors are reported without being asked for, and a pipe without a reader is one.
    poll.register(_STDOUT, 0)

    def wait() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=wait, name="reader", daemon=True).start()
