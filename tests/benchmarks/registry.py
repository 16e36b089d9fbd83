"""Measures a registry of many versions: looks, `best`, publishing, and a server that follows it.

python -m tests.benchmarks.registry --store objects --versions 10000
"""

import asyncio
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count as numbered
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry

from inference_service.metrics import InferenceMetrics
from inference_service.versions.catalogue import Catalogue
from shared.device.accelerator import Memory
from shared.errors import Unavailable
from shared.registry.disk_store import DiskStore
from shared.registry.documents import encoded
from shared.registry.manifest import MANIFEST_NAME, FileRecord, VersionManifest
from shared.registry.registry import Registry
from shared.service import cli
from shared.service.lists import print_rows
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server
from tests.object_storage.client import open_place
from tests.object_storage.kinds import Count, Kind, describe, place_of
from tests.object_storage.server import Place
from tests.registries import own_registry
from tests.shared.registry.scenarios import make_manifest

# Writers that fill the registry together.
_THREADS = 8
_EVALUATION_SET = "held-out"
_TIMES = 5


class Table:
    """Rows of what was measured: the median time, and the requests of one time."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._rows: list[tuple[str, str, str]] = []

    def measure(self, what: str, act: Callable[[], object], times: int = _TIMES) -> None:
        """Does something several times and adds a row."""
        seconds = []
        self._count()
        for _ in range(times):
            begin = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - begin)
        self.add(what, _show(statistics.median(seconds)), describe(self._count(), times))

    def add(self, what: str, value: str, requests: str = "") -> None:
        """Adds a row, and prints it so that a long measurement shows where it is."""
        self._rows.append((what, value, requests))
        print(f"{what}: {value} {requests}", file=sys.stderr, flush=True)

    def print(self) -> None:
        """Prints all rows."""
        print_rows(("what", "median", "requests"), self._rows)


def _show(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def fill(registry: Registry, versions: int) -> None:
    """Publishes versions of a few bytes, each a little better than the one before it.

    Only the first one is published, which takes long when it is repeated; the others are copies with ids and manifests
    of their own.
    """
    fence = registry.take_over("many")

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")

    def manifest(number: int, files: tuple[FileRecord, ...]) -> VersionManifest:
        return make_manifest(
            number, files, run="many", evaluation_set=_EVALUATION_SET, bits_per_byte=3 - number / (versions + 1)
        )

    first = registry.publish_version(fence, write, manifest)
    others = range(2, versions + 1)
    if isinstance(registry.store, DiskStore):
        for number in others:
            folder = registry.store.path(f"versions/{number}")
            shutil.copytree(registry.store.path("versions/1"), folder)
            (folder / MANIFEST_NAME).write_text(manifest(number, first.files).to_json(), encoding="utf-8")
        return
    import obstore

    bucket = open_place(Place(registry.store.address, os.environ["AWS_ENDPOINT_URL"]))
    content = json.loads(bytes(obstore.get(bucket, "versions/1").bytes()))["value"]

    def copy(number: int) -> None:
        changed = content | {"id": secrets.token_hex(16), "manifest": manifest(number, first.files).to_json()}
        obstore.put(bucket, f"versions/{number}", encoded(changed))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, others))


def resident_mib() -> float:
    """Returns the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def _look(registry: Registry, table: Table, count: Count, looks: int) -> None:
    """Looks as a server does, often, and adds what it costs."""
    metrics = InferenceMetrics(CollectorRegistry(), lambda: Memory(0, 0, 0, 0), lambda: 0, lambda: 0, {})
    catalogue = Catalogue(registry, "cpu", metrics)
    await catalogue.look()
    catalogue.seen()
    seconds, memory = [], []
    count()
    for _ in range(looks):
        begin = time.perf_counter()
        await catalogue.look()
        catalogue.seen()
        seconds.append(time.perf_counter() - begin)
        memory.append(resident_mib())
    table.add("a server's look", _show(statistics.median(seconds)), describe(count(), looks))
    table.add(f"resident memory after {looks // 10} looks", f"{memory[looks // 10]:.0f} MiB")
    table.add(f"resident memory after {looks} looks", f"{memory[-1]:.0f} MiB")


def _hot_load(registry: Registry, table: Table, count: Count, var: Path) -> None:
    """Starts a server on the registry, and adds how long it takes to serve."""
    publish_tiny_version(registry, 0.9, evaluation_set=_EVALUATION_SET)
    count()
    begin = time.perf_counter()
    server = Server(var)
    try:
        with server.client() as client:

            def serves(number: int) -> bool:
                with suppress(Unavailable):
                    return client.model().version == number
                return False

            _wait(lambda: serves(registry.versions()[-1].version))
            table.add("a server starts until it serves", _show(time.perf_counter() - begin), describe(count()))
            seconds = []
            for better in range(_TIMES):
                number = publish_tiny_version(registry, 0.8 - better / 10, evaluation_set=_EVALUATION_SET).version
                begin = time.perf_counter()
                _wait(lambda number=number: serves(number))  # type: ignore[misc]
                seconds.append(time.perf_counter() - begin)
            table.add("from the commit of a version until it serves", _show(statistics.median(seconds)))
            memory = server.metrics()["gptloop_inference_memory_bytes", "resident"] / 2**20
            table.add("resident memory of the server", f"{memory:.0f} MiB")
    finally:
        server.end()


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline_s:
            raise Unavailable("The server did not serve the version within five minutes.")
        time.sleep(0.05)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def main(
    store: Annotated[Kind, typer.Option(help="Where the registry is.")] = Kind.DISK,
    versions: Annotated[int, typer.Option(min=10, help="How many versions it has.")] = 10_000,
    looks: Annotated[int, typer.Option(min=10, help="How often a server looks.")] = 200,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="gptloop-registry-"))
    try:
        with place_of(store, folder) as count:
            table = Table(count)
            registry = own_registry()
            numbers = numbered(1)

            def publish() -> None:
                publish_tiny_version(registry, 1 - next(numbers) / 100, evaluation_set=_EVALUATION_SET)

            begin = time.perf_counter()
            fill(registry, versions)
            table.add(f"making {versions:,} versions", _show(time.perf_counter() - begin))
            table.measure("first look of a process", lambda: own_registry().versions(), 1)
            registry.versions()
            table.measure("look again", registry.versions)
            table.measure("`best`", lambda: registry.resolve("best"))
            table.measure("publish", publish)
            asyncio.run(_look(registry, table, count, looks))
            _hot_load(registry, table, count, folder / "var")
            print(f"\n{store}, {versions:,} versions")
            table.print()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(app)
