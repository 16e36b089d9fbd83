"""Ends a command without a traceback on Ctrl-C, also while its modules load and after its work.

Imports only the standard library, because it must run before any import that takes time.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# The exit code that a shell reports for a program that SIGINT ended.
EXIT_CODE = 128 + signal.SIGINT


def end_quietly() -> None:
    """Makes SIGINT end this process at once, without a traceback; if SIGINT is ignored, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Makes SIGINT raise KeyboardInterrupt inside the block, so that it can clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_quietly()


def _end(_signal: int, _frame: object) -> None:
    os._exit(EXIT_CODE)
