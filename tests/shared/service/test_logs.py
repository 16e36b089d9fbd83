import json
import re
import subprocess
import sys

import pytest

from shared.errors import InvalidArgument
from shared.service.logs import LogFormat, LogLevel, LogSettings, read_log_settings

LINES = """
import logging
from shared.service import cli, logs
from shared.service.log_ids import about, note, with_ids
{configure}
own, other = logging.getLogger("shared.a"), logging.getLogger("other")
"""


def written(code: str, configure: str = "logs.configure('trainer')", **settings: str) -> list[str]:
    """Returns the lines on standard error of a program that logs."""
    program = LINES.format(configure=configure) + code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=settings)
    assert done.stdout == ""
    return done.stderr.splitlines()


def objects(code: str, configure: str = "logs.configure('trainer')", **settings: str) -> list[dict[str, object]]:
    lines = written(code, configure, GPTLOOP_LOG_FORMAT="json", **settings)
    return [json.loads(line) for line in lines]


def test_a_record_is_one_line_on_standard_error() -> None:
    (line,) = written("own.info('begins'); own.debug('unseen'); logging.getLogger('httpx').info('unseen')")
    assert line.endswith(" trainer INFO shared.a: begins")


def test_a_value_from_outside_begins_no_line_of_its_own() -> None:
    code = r"own.info('begins %s', 'a\n2026 trainer INFO shared.a: forged\x1b[1m', extra=with_ids(run='b\rc'))"
    (line,) = written(code)
    assert line.endswith(r": begins a\n2026 trainer INFO shared.a: forged\x1b[1m [run=b\rc]")


def test_a_line_ends_with_the_ids_of_its_task_and_its_process() -> None:
    code = """
with about(request_id="r1"):
    note(version=3)
    own.info("works")
own.info("rests")
own.info("frees", extra=with_ids(version=4))
"""
    lines = written(code, "logs.configure('trainer', job='j1')")
    assert [line.partition(": ")[2] for line in lines] == [
        "works [job=j1 request_id=r1 version=3]",
        "rests [job=j1]",
        "frees [job=j1 version=4]",
    ]


def test_json_has_an_object_a_line_with_time_ids_and_the_exception_as_text() -> None:
    code = """
with about(request_id="r1", version=3):
    try:
        1 / 0
    except ZeroDivisionError:
        own.exception("fails in\\ntwo lines \\ud800")
"""
    (line,) = objects(code)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line.pop("time")))
    exception = str(line.pop("exception"))
    assert exception.startswith("Traceback") and exception.endswith("ZeroDivisionError: division by zero")
    assert line == {
        "level": "error",
        "service": "trainer",
        "logger": "shared.a",
        "message": "fails in\ntwo lines \ud800",
        "request_id": "r1",
        "version": 3,
    }


def test_the_end_of_a_process_by_an_error_is_json_too() -> None:
    crash = objects("1 / 0")
    sentence = objects("from shared.errors import NotFound\ndef fail(): raise NotFound('Gone.')\ncli.end(fail)")
    assert [(line["level"], line["message"]) for line in [*crash, *sentence]] == [
        ("critical", "the process ends by an error"),
        ("error", "Gone."),
    ]
    assert "ZeroDivisionError" in str(crash[0]["exception"])


@pytest.mark.parametrize(
    ("level", "seen"),
    [("debug", "debug info warning"), ("info", "info warning"), ("warning", "warning"), ("error", "")],
)
def test_the_level_counts_for_the_projects_lines_and_not_for_those_of_libraries(level: str, seen: str) -> None:
    code = "own.debug('debug'); own.info('info'); own.warning('warning'); other.debug('no'); other.info('library')"
    lines = objects(code, GPTLOOP_LOG_LEVEL=level)
    assert " ".join(str(line["message"]) for line in lines) == f"{seen} library".strip()


def test_settings_have_defaults_and_reject_other_words() -> None:
    assert read_log_settings({}) == LogSettings(LogFormat.CONSOLE, LogLevel.INFO)
    with pytest.raises(InvalidArgument, match="GPTLOOP_LOG_FORMAT is 'xml', but must be console or json"):
        read_log_settings({"GPTLOOP_LOG_FORMAT": "xml"})
    with pytest.raises(InvalidArgument, match="GPTLOOP_LOG_LEVEL is 'INFO', but must be info, debug, warning or error"):
        read_log_settings({"GPTLOOP_LOG_LEVEL": "INFO"})
