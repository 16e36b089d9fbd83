"""The proxy before the S3 server: signatures stay valid, and each fault is what its name says."""

from typing import Any

import pytest

from tests.object_storage.client import open_place
from tests.object_storage.proxy import Fault, FaultyProxy, Request
from tests.object_storage.server import MISSING, ObjectServer

pytestmark = pytest.mark.slow
obstore = pytest.importorskip("obstore", reason=MISSING)
errors = pytest.importorskip("obstore.exceptions", reason=MISSING)

CONTENT = bytes(range(256)) * 400
# Long enough for an honest answer, so only a fault meets it.
PATIENT_S, IMPATIENT_S = 60.0, 0.3


class Site:
    """A place, seen through the proxy and past it."""

    def __init__(self, server: ObjectServer, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        place = server.place()
        self.direct = open_place(place)
        self.seen = open_place(place.behind(proxy.endpoint), PATIENT_S)
        self.impatient = open_place(place.behind(proxy.endpoint), IMPATIENT_S)

    def names(self) -> list[str]:
        return sorted(each["path"] for each in obstore.list(self.direct).collect())


@pytest.fixture
def site(object_server: ObjectServer, object_proxy: FaultyProxy) -> Site:
    return Site(object_server, object_proxy)


def _get(store: Any, name: str) -> bytes:
    return bytes(obstore.get(store, name).bytes())


def test_without_faults_everything_passes(site: Site) -> None:
    first = obstore.put(site.seen, "a b/ä+%", CONTENT, mode="create")
    assert _get(site.seen, "a b/ä+%") == CONTENT
    assert obstore.head(site.seen, "a b/ä+%")["size"] == len(CONTENT)
    with pytest.raises(errors.AlreadyExistsError):
        obstore.put(site.seen, "a b/ä+%", b"", mode="create")
    obstore.put(site.seen, "a b/ä+%", b"other", mode={"e_tag": first["e_tag"]})
    assert [each["path"] for each in obstore.list(site.seen).collect()] == ["a b/ä+%"]
    obstore.delete(site.seen, "a b/ä+%")
    assert site.names() == []
    kinds = [(request.method, request.lists, request.conditional) for request in site.proxy.requests]
    assert kinds == [
        ("PUT", False, True),
        ("GET", False, False),
        ("HEAD", False, False),
        ("PUT", False, True),
        ("PUT", False, True),
        ("GET", True, False),
        ("POST", False, False),
    ]


@pytest.mark.parametrize(
    ("fault", "carried_out"),
    [
        (Fault.RESET, False),
        (Fault.ERROR_500, False),
        (Fault.ERROR_503, False),
        (Fault.DONE_THEN_RESET, True),
        (Fault.DONE_THEN_500, True),
        (Fault.SILENCE, False),
        (Fault.DONE_THEN_SILENCE, True),
    ],
)
def test_a_failing_write_is_carried_out_or_not_as_the_fault_says(site: Site, fault: Fault, carried_out: bool) -> None:
    rule = site.proxy.inject(fault, Request.writes)
    silent = fault in (Fault.SILENCE, Fault.DONE_THEN_SILENCE)
    with pytest.raises(errors.BaseError):
        obstore.put(site.impatient if silent else site.seen, "object", CONTENT, use_multipart=False)
    assert rule.hits == 1
    assert site.names() == (["object"] if carried_out else [])


@pytest.mark.parametrize("fault", [Fault.CONFLICT_409, Fault.PRECONDITION_412])
def test_a_conditional_write_is_refused_although_nothing_is_there(site: Site, fault: Fault) -> None:
    site.proxy.inject(fault, lambda request: request.conditional)
    with pytest.raises((errors.AlreadyExistsError, errors.PreconditionError)):
        obstore.put(site.seen, "object", CONTENT, mode="create")
    assert site.names() == []
    obstore.put(site.seen, "object", CONTENT, mode="create")


def test_bodies_are_torn_altered_and_slow(site: Site) -> None:
    obstore.put(site.direct, "object", CONTENT)
    site.proxy.inject(Fault.ALTERED_BODY)
    altered = _get(site.seen, "object")
    assert len(altered) == len(CONTENT)
    assert sum(one != other for one, other in zip(altered, CONTENT, strict=True)) == 1
    for fault in (Fault.TORN_BODY, Fault.SLOW_BODY):
        site.proxy.inject(fault)
        with pytest.raises(errors.BaseError):
            _get(site.impatient, "object")
    assert _get(site.seen, "object") == CONTENT


def test_a_fault_meets_what_it_matches_as_often_as_it_says(site: Site) -> None:
    rule = site.proxy.inject(Fault.ERROR_503, lambda request: request.writes("second"), times=2)
    obstore.put(site.seen, "first", b"")
    for _ in range(2):
        with pytest.raises(errors.BaseError):
            obstore.put(site.seen, "second", b"")
    obstore.put(site.seen, "second", b"")
    assert (rule.hits, site.names()) == (2, ["first", "second"])
