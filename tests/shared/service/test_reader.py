import subprocess
import sys
from pathlib import Path

from tests.waiting import HANG_S
from tests.workplace import PROJECT

WAITS = """
import threading
from shared.service.reader import end_without_reader
end_without_reader()
print("ready", flush=True)
threading.Event().wait()
"""


def test_a_process_ends_when_the_last_reader_of_its_output_has_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(HANG_S) == 1


def test_a_file_needs_no_reader(tmp_path: Path) -> None:
    ends = WAITS.replace("threading.Event().wait()", "print(threading.active_count())")
    with (tmp_path / "output").open("w+") as output:
        assert subprocess.run([sys.executable, "-c", ends], cwd=PROJECT, stdout=output).returncode == 0
        output.seek(0)
        assert output.read() == "ready\n1\n"
