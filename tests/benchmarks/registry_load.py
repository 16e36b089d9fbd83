"""Counts what an inference server asks of a registry in object storage in which nothing changes (deploy/scale.md).

`python -m tests.benchmarks.registry_load` starts a real S3 server, a proxy that counts, and an inference server; it
takes eight minutes on two cores that others use too.
"""

import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from shared.errors import FailedPrecondition
from shared.service import cli
from shared.service.lists import print_rows
from shared.service.settings import read_directories
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server
from tests.object_storage.proxy import FaultyProxy, Request
from tests.object_storage.server import MISSING, ObjectServer, is_installed
from tests.waiting import wait_until

_VERSIONS = (10, 1200)
_SAMPLE_S = 20.0
_INTERVAL_S = 1.0


def _kind(request: Request) -> str:
    return "list" if request.lists else "read" if request.method in ("GET", "HEAD") else "write"


def _count(folder: Path, versions: int) -> list[str]:
    """Returns the row of a registry with this many versions."""
    store = ObjectServer(folder / "store")
    proxy = FaultyProxy(store.port)
    try:
        place = store.place()
        # The library of the store reads the variables of this process.
        os.environ.update(place.settings)
        registry = read_directories(os.environ | {"GPTLOOP_VAR": str(folder / "publisher")}).open_registry()
        begun_s = time.monotonic()
        for number in range(versions):
            # The first one stays the best.
            publish_tiny_version(registry, 1.0 + number / 1e6)
        published_s = (time.monotonic() - begun_s) / versions
        settings = place.behind(proxy.endpoint).settings
        server = Server(folder / "server", GPTLOOP_INFERENCE_POLL_INTERVAL_S=str(_INTERVAL_S), **settings)
        try:
            wait_until(server.serves)
            time.sleep(5 * _INTERVAL_S)
            proxy.clear()
            time.sleep(_SAMPLE_S)
            asked = Counter(map(_kind, proxy.requests))
        finally:
            server.end()
    finally:
        proxy.end()
        store.end()
    looks = _SAMPLE_S / _INTERVAL_S
    counts = [f"{asked[kind] / looks:.1f}" for kind in ("list", "read", "write")]
    return [f"{versions:,}", *counts, f"{published_s:.3f} s"]


def main() -> None:
    """Prints the requests of a look."""
    if not is_installed():
        raise FailedPrecondition(f"{MISSING}.")
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for versions in _VERSIONS:
            own = Path(folder) / str(versions)
            (own / "store").mkdir(parents=True)
            rows.append(_count(own, versions))
    print_rows(["versions", "lists a look", "reads", "writes", "a publication"], rows)


if __name__ == "__main__":
    cli.end(main)
