"""The S3 server of the tests: it keeps what a registry needs, and never outlives the tests."""

import os
import signal
import subprocess
import sys

import pytest

from tests.object_storage.client import open_place
from tests.object_storage.server import MISSING, ObjectServer, is_gone, is_installed
from tests.waiting import wait_until
from tests.workplace import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason=MISSING)]
obstore = pytest.importorskip("obstore", reason=MISSING)
errors = pytest.importorskip("obstore.exceptions", reason=MISSING)


def test_an_object_is_created_once_and_replaced_only_as_it_was_read(object_server: ObjectServer) -> None:
    store = open_place(object_server.place())
    first = obstore.put(store, "number", b"1", mode="create")
    with pytest.raises(errors.AlreadyExistsError):
        obstore.put(store, "number", b"2", mode="create")
    second = obstore.put(store, "number", b"3", mode={"e_tag": first["e_tag"]})
    with pytest.raises(errors.PreconditionError):
        obstore.put(store, "number", b"4", mode={"e_tag": first["e_tag"]})
    assert second["e_tag"] != first["e_tag"]
    assert bytes(obstore.get(store, "number").bytes()) == b"3"


def test_places_do_not_see_one_another(object_server: ObjectServer) -> None:
    one, other = open_place(object_server.place()), open_place(object_server.place())
    obstore.put(one, "object", b"here")
    assert [each["path"] for each in obstore.list(one).collect()] == ["object"]
    assert not obstore.list(other).collect()


def test_a_killed_server_comes_back_with_its_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = ObjectServer(tmp_path_factory.mktemp("store"))
    try:
        store = open_place(server.place())
        obstore.put(store, "object", b"kept")
        server.kill()
        with pytest.raises(errors.BaseError):
            obstore.get(store, "object")
        server.start()
        assert bytes(obstore.get(store, "object").bytes()) == b"kept"
    finally:
        server.end()


def test_the_server_ends_with_the_process_that_started_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    program = """
import sys
from pathlib import Path
from tests.object_storage.server import MISSING, ObjectServer, is_gone, is_installed
print(ObjectServer(Path(sys.argv[1])).pid, flush=True)
sys.stdin.read()
"""
    folder = tmp_path_factory.mktemp("store")
    with subprocess.Popen(
        [sys.executable, "-c", program, folder],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid))
