"""The sentence on why no version serves."""

from dataclasses import replace

import pytest

from inference_service.versions.planner import State
from inference_service.versions.status import VersionStatus, why_none_serves
from tests.shared.registry.scenarios import make_manifest

REFUSED = VersionStatus(1, make_manifest(1), State.REFUSED, "loss_mismatch: it claims too much")
WAITING = VersionStatus(2, make_manifest(2), State.WAITING, "Version 2 waits for its files: a is missing.")
LOADING = VersionStatus(3, make_manifest(3), State.LOADING)


@pytest.mark.parametrize(
    ("statuses", "policy", "sentence"),
    [
        (
            [],
            "best",
            "No version serves yet: there is none in the registry, and the first one comes with the first evaluation "
            "of a training job.",
        ),
        ([REFUSED, WAITING, LOADING], "best", "No version serves yet: version 3 is being examined."),
        ([REFUSED, WAITING], "best", "No version serves yet: version 2 waits for its files: a is missing."),
        (
            [REFUSED, replace(REFUSED, number=3, reason="corrupt: it was changed.")],
            "latest",
            "No version can serve: versions 1 to 3 were refused, the last one as corrupt: it was changed.",
        ),
        (
            [REFUSED],
            "pinned:7",
            "No version can serve: version 1 was refused, as loss_mismatch: it claims too much. The policy is "
            "'pinned:7', which names no version.",
        ),
        (
            [replace(REFUSED, labels=("pinned:1",))],
            "pinned:1",
            "No version can serve: version 1 was refused, as loss_mismatch: it claims too much.",
        ),
    ],
)
def test_the_sentence_gives_the_reason(statuses: list[VersionStatus], policy: str, sentence: str) -> None:
    assert why_none_serves(statuses, policy) == sentence


def test_the_sentence_is_short_whatever_the_reason() -> None:
    long = replace(REFUSED, reason="corrupt: " + "x" * 10_000)
    assert len(why_none_serves([long], f"run:{'y' * 200}")) <= 350
