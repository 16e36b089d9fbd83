"""A real S3 server, SeaweedFS, for tests and measurements, which can be killed and started again."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shared.service.listening import free_port_numbers
from tests.waiting import wait_until

PROGRAM = Path(sys.prefix) / "bin" / "weed"
MISSING = "obstore or SeaweedFS is not installed: make .venv/object-storage-tests"
_BUCKET = "gptloop"
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "a secret key of the tests",
    "AWS_REGION": "local",
}
# Each part that listens, with its port for HTTP and for gRPC. Otherwise two servers of one machine would meet.
_PARTS = ("master", "volume", "filer", "s3", "admin")
_OPTIONS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-webdav=false",
    "-admin.ui=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-master.telemetry=false",
    f"-bucket={_BUCKET}",
)
# Ends the server when whoever started it has gone, however that happened: the other end of standard input closes then.
# Ctrl-C must not end the shell before the server.
_LEASH = 'trap "" INT; "$@" & echo $!; read _; kill -9 $! 2>/dev/null; wait; rm -f $SOCKETS'


@dataclass(frozen=True)
class Place:
    """An empty folder in the bucket.

    url: the value of GPTLOOP_REGISTRY.
    endpoint: the address of the server, or of a proxy before it.
    """

    url: str
    endpoint: str

    @property
    def settings(self) -> dict[str, str]:
        """The variables with which a process uses it as its registry."""
        where = {"GPTLOOP_REGISTRY": self.url, "AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true"}
        return {**_CREDENTIALS, **where}

    def behind(self, endpoint: str) -> "Place":
        """Returns the same place, reached over the address of a proxy."""
        return replace(self, endpoint=endpoint)

    def environment(self, other: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Returns the variables of a process, without what the person who runs the tests uses of S3."""
        return {name: value for name, value in other.items() if not name.startswith("AWS_")} | self.settings


def is_installed() -> bool:
    """Returns whether the server and the client library are there."""
    return PROGRAM.exists() and any(Path(sys.prefix).glob("lib/python3*/site-packages/obstore"))


class ObjectServer:
    """A server on ports of its own, with its data in a folder; they survive a kill and a start.

    It ends with this process, also if that is killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        numbers = iter(free_port_numbers(2 * len(_PARTS)))
        self._ports = {part: (next(numbers), next(numbers)) for part in _PARTS}
        self.port = self._ports["s3"][0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.start()

    def place(self) -> Place:
        """Returns an empty place."""
        return Place(f"s3://{_BUCKET}/{uuid.uuid4().hex[:12]}", self.endpoint)

    def start(self) -> None:
        """Starts the server; returns once it keeps an object and gives it back."""
        ports = [f"-{part}.port={http}" for part, (http, _) in self._ports.items()]
        ports += [f"-{part}.port.grpc={grpc}" for part, (_, grpc) in self._ports.items()]
        command = [str(PROGRAM), "mini", f"-dir={self.folder / 'data'}", *_OPTIONS, *ports]
        sockets = " ".join(f"/tmp/seaweedfs-*-{port}.sock" for both in self._ports.values() for port in both)
        with self.log.open("ab") as log:
            self._shell = subprocess.Popen(
                ["sh", "-c", _LEASH, "sh", *command],
                env=os.environ | _CREDENTIALS | {"SOCKETS": sockets},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._shell.stdout is not None
        self.pid = int(self._shell.stdout.readline())
        wait_until(self._keeps_objects, lost=lambda: is_gone(self.pid))

    def kill(self) -> None:
        """Kills the server."""
        for stream in (self._shell.stdin, self._shell.stdout):
            assert stream is not None
            stream.close()
        self._shell.wait()

    def pause(self, paused: bool) -> None:
        """Stops the process of the server, or lets it go on."""
        os.kill(self.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def end(self) -> None:
        """Kills the server and removes its data."""
        self.kill()
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def _keeps_objects(self) -> bool:
        import obstore
        from obstore.exceptions import BaseError

        from tests.object_storage.client import open_place

        store = open_place(self.place())
        try:
            obstore.put(store, "ready", b"")
            return not obstore.get(store, "ready").bytes()
        except BaseError:
            return False


def is_gone(pid: int) -> bool:
    """Returns whether a process has ended, even if its exit code has not been read yet."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()[:1] in ("", "Z")
