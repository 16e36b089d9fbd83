"""Ending quietly on Ctrl-C while a command is not at work: before it, when its modules load, and after it.

Loads nothing but the standard library, as it must come before everything that takes time to load.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# What a shell reports of a program that SIGINT ended.
EXIT_CODE = 128 + signal.SIGINT


def end_quietly() -> None:
    """Lets SIGINT end this process at once, without a traceback; where SIGINT is ignored, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Lets SIGINT raise KeyboardInterrupt, so that the work inside can clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_quietly()


def _end(_signal: int, _frame: object) -> None:
    os._exit(EXIT_CODE)
