import subprocess
import sys


def test_a_record_is_one_line_on_standard_error() -> None:
    code = (
        "import logging\n"
        "from shared.service.logs import configure\n"
        "configure('trainer')\n"
        "logging.getLogger('a.b').info('begins')\n"
        "logging.getLogger('a.b').debug('unseen')\n"
        "logging.getLogger('httpx').info('unseen')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith(" trainer INFO a.b: begins")
