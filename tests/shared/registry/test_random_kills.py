from pathlib import Path

import pytest
from rich.progress import Progress

from tests.object_storage.kinds import Kind, place_of
from tests.object_storage.server import MISSING, is_installed
from tests.soak.publish import LONGEST_LIVES_S, kill_often

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [Kind.DISK, pytest.param(Kind.OBJECTS, marks=pytest.mark.skipif(not is_installed(), reason=MISSING))],
)
def test_a_process_killed_at_any_moment_leaves_a_valid_registry(tmp_path: Path, kind: Kind) -> None:
    with place_of(kind, tmp_path):
        outcome = kill_often(8, 1, LONGEST_LIVES_S[kind], Progress(disable=True))
    assert not outcome.violations
    assert outcome.kills == 8
