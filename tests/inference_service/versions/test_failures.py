"""Counting the failures of versions, and trying again to read one."""

from typing import Any

import pytest

from inference_service.engine.request import FAILURES_WITHIN_S
from inference_service.versions.entry import RETRY_AFTER_S, Entry
from inference_service.versions.failures import Failures
from inference_service.versions.resident import Resident
from shared.decoding.weight_format import WeightFormat
from shared.errors import GptloopError
from tests.shared.registry.scenarios import make_manifest

TOKENIZER: Any = None


def test_only_failures_of_the_last_minute_count() -> None:
    failures, errors = Failures(), [GptloopError("no") for _ in range(3)]
    times = (0.0, 1.0, FAILURES_WITHIN_S + 0.5)
    assert [failures.add(1, error, now) for error, now in zip(errors, times, strict=True)] == [1, 2, 2]


def test_one_step_that_fails_several_streams_counts_once() -> None:
    failures, error, other = Failures(), GptloopError("a step"), GptloopError("another step")
    assert [failures.add(1, each, 0.0) for each in (error, error, other)] == [1, 0, 2]


def test_versions_are_counted_apart_and_forgotten_apart() -> None:
    failures, errors = Failures(), [GptloopError("no") for _ in range(4)]
    assert [failures.add(number, errors[number], 0.0) for number in (1, 2)] == [1, 1]
    failures.forget(1)
    assert (failures.add(1, errors[0], 0.0), failures.add(2, errors[3], 0.0)) == (1, 2)


def test_a_version_is_blamed_for_a_minute() -> None:
    failures, resident = Failures(), Resident(make_manifest(1), TOKENIZER, 3.0, 0, WeightFormat.FP32)
    assert failures.blamed(0.0) is None
    failures.blame(resident, 0.0)
    assert failures.blamed(FAILURES_WITHIN_S) is resident
    assert failures.blamed(FAILURES_WITHIN_S + 0.1) is None


def test_each_attempt_to_read_a_version_waits_longer_up_to_a_bound() -> None:
    entry, waits = Entry.of(make_manifest(7)), []
    for _ in range(8):
        entry = entry.postponed(OSError("no memory."), now=100.0)
        waits.append(entry.retry_at - 100.0)
    assert waits == pytest.approx([RETRY_AFTER_S * factor for factor in (1, 2, 4, 8, 16, 32, 60, 60)])
    assert entry.retry_sentence == "Version 7 cannot be loaded now: no memory; it is tried again."
