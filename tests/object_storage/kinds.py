"""Both kinds of store for a measurement: a folder on a disk, and an S3 server with a proxy that counts requests."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from shared.errors import FailedPrecondition
from tests.object_storage.proxy import FaultyProxy, Request
from tests.object_storage.server import MISSING, ObjectServer, is_installed
from tests.registries import own_registry


class Kind(StrEnum):
    """Where a registry is: in a folder, on a server of its own, or where GPTLOOP_REGISTRY says."""

    DISK = "disk"
    OBJECTS = "objects"
    NAMED = "named"


# Returns the requests since its last call, by their kinds; none if the registry is on a disk.
Count = Callable[[], Counter[str]]


def describe(requests: Counter[str], times: int = 1) -> str:
    """Describes the requests of one of several times, such as `12 get, 1 list`."""
    return ", ".join(f"{count / times:,.10g} {kind}" for kind, count in sorted(requests.items())) or "none"


@contextmanager
def place_of(kind: Kind, folder: Path) -> Iterator[Count]:
    """Gives this process an empty registry in a folder, or on a server whose data are there; ends the server.

    Raises `FailedPrecondition` if the server is not installed, or what GPTLOOP_REGISTRY names is not empty.
    """
    if kind is Kind.NAMED:
        if own_registry().versions():
            raise FailedPrecondition("The registry that GPTLOOP_REGISTRY names has versions, but must be empty.")
        yield Counter
        return
    before = dict(os.environ)
    for name in before:
        if name.startswith(("AWS_", "GPTLOOP_")):
            del os.environ[name]
    os.environ["GPTLOOP_VAR"] = str(folder / "var")
    try:
        if kind is Kind.DISK:
            yield Counter
        else:
            with _served(folder / "objects") as counted:
                yield counted
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _served(folder: Path) -> Iterator[Count]:
    if not is_installed():
        raise FailedPrecondition(f"{MISSING}.")
    folder.mkdir()
    server = ObjectServer(folder)
    proxy = FaultyProxy(server.port)

    def counted() -> Counter[str]:
        counts = Counter(map(_kind_of, proxy.requests))
        proxy.clear()
        return counts

    try:
        os.environ.update(server.place().behind(proxy.endpoint).settings)
        yield counted
    finally:
        proxy.end()
        server.end()


def _kind_of(request: Request) -> str:
    if request.lists:
        return "list"
    return "delete" if request.deletes else request.method.lower()
