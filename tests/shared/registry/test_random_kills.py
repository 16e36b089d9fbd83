from pathlib import Path

import pytest
from rich.progress import Progress

from tests.soak.publish import kill_often

pytestmark = pytest.mark.slow


def test_a_process_killed_at_any_moment_leaves_a_valid_registry(tmp_path: Path) -> None:
    outcome = kill_often(tmp_path / "registry", kills=8, seed=1, progress=Progress(disable=True))
    assert not outcome.violations
    assert outcome.kills == 8
