"""Publishers that race for numbers in a bucket whose answers get lost, as `python -m tests.soak.race` lets 64 do."""

from pathlib import Path

import pytest

from tests.object_storage.proxy import Fault, FaultyProxy, Request
from tests.object_storage.server import MISSING, ObjectServer
from tests.soak.race import race

pytestmark = pytest.mark.slow
pytest.importorskip("obstore", reason=MISSING)

FAULTS = (Fault.DONE_THEN_500, Fault.DONE_THEN_RESET, Fault.CONFLICT_409, Fault.RESET)


def test_each_number_is_given_once_although_answers_get_lost(
    object_server: ObjectServer, object_proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_server.place().behind(object_proxy.endpoint).settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPTLOOP_VAR", str(tmp_path))
    rules = [object_proxy.inject(fault, _creates, times=3) for fault in FAULTS]
    outcome = race(publishers=4, each=4)
    assert not outcome.violations
    assert sorted(number for own in outcome.numbers.values() for number in own) == list(range(1, 17))
    assert [rule.hits for rule in rules] == [3] * len(FAULTS)


def _creates(request: Request) -> bool:
    return request.conditional and "/versions/" in request.path
