"""Logging to standard error: one line for each record, for people or as JSON."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType

from shared.service.log_ids import current_ids
from shared.service.settings import Environment, read_choice
from shared.text import printable

# These log every request, or every poll, at level INFO.
_NOISY = ("asyncio", "datasets", "filelock", "fsspec", "httpcore", "httpx", "huggingface_hub", "rq", "urllib3")
# The loggers of this project; a module that runs as a program is `__main__`.
_OWN = ("__main__", "deploy", "inference_service", "shared", "trainer_service")

# Returns more ids for the lines of the current task.
MoreIds = Callable[[], dict[str, str]]


class LogFormat(StrEnum):
    """How a record is written."""

    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    """The lowest level of the project's records that are written."""

    INFO = "info"
    DEBUG = "debug"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class LogSettings:
    """`GPTLOOP_LOG_FORMAT`, and `GPTLOOP_LOG_LEVEL` of the project's own records."""

    format: LogFormat
    level: LogLevel


def read_log_settings(environment: Environment) -> LogSettings:
    """Reads the settings; raises `InvalidArgument`, which names the invalid variable."""
    return LogSettings(
        read_choice(environment, "GPTLOOP_LOG_FORMAT", LogFormat),
        read_choice(environment, "GPTLOOP_LOG_LEVEL", LogLevel),
    )


def configure(service: str, environment: Environment = os.environ, more_ids: MoreIds = dict, **ids: str) -> None:
    """Writes the records of this process, which names itself `service`, as the settings ask.

    Each line has the ids of its task, and all have `ids`. Records of libraries are written from INFO on. Raises
    `InvalidArgument` if a setting is invalid.
    """
    settings = read_log_settings(environment)
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter(service) if settings.format is LogFormat.JSON else _ConsoleFormatter(service))
    handler.addFilter(_Ids(ids, more_ids))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for own in _OWN:
        logging.getLogger(own).setLevel(settings.level.upper())
    if settings.format is LogFormat.JSON:
        sys.excepthook = _log_uncaught


def report_error(sentence: str) -> None:
    """Writes the error that ends a command to standard error, as a JSON line if records are written so."""
    if any(isinstance(handler.formatter, _JsonFormatter) for handler in logging.getLogger().handlers):
        logging.getLogger(__name__).error("%s", sentence)
    else:
        print(f"error: {sentence}", file=sys.stderr)


class _Ids(logging.Filter):
    """Adds to each record `ids`, and `fields`: values that its message contains, as the caller gives them."""

    def __init__(self, ids: dict[str, str], more_ids: MoreIds) -> None:
        super().__init__()
        self._ids = ids
        self._more_ids = more_ids

    def filter(self, record: logging.LogRecord) -> bool:
        """Adds the ids, and keeps the record."""
        given = getattr(record, "ids", {})
        record.ids = {**self._ids, **current_ids(), **self._more_ids(), **given}
        return True


class _ConsoleFormatter(logging.Formatter):
    """Time, process name, level, logger, message, ids."""

    def __init__(self, service: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03d {service} %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Writes the first line of a record."""
        ids = " ".join(f"{name}={value}" for name, value in getattr(record, "ids", {}).items())
        line = super().formatMessage(record)
        # A name or a path in it may come from anybody, and must not begin a line of its own.
        return printable(f"{line} [{ids}]" if ids else line)


class _JsonFormatter(logging.Formatter):
    """An object on one line; the exception and its traceback are a text in it."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Writes a record."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {
            "time": at,
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "ids", {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("the process ends by an error", exc_info=(kind, error, traceback))
