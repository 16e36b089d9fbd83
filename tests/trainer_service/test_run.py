from pathlib import Path

import pytest

from shared.accelerator import Accelerator
from shared.registry.retention import Retention
from shared.registry.store import Registry
from shared.settings import Directories
from trainer_service.attempt import Attempt, Stopped
from trainer_service.events import Event
from trainer_service.run import TrainingRun
from trainer_service.spec import TrainingRequest, resolve

DEVICE = Accelerator("cpu", "cpu", "", blas=None, memory_bytes=0)


def test_a_stop_while_the_data_are_prepared_leaves_nothing(tmp_path: Path) -> None:
    directories = Directories(tmp_path)
    spec = resolve(TrainingRequest(), Registry(directories.registry))
    told: list[Event] = []
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        TrainingRun(spec, Attempt(directories, Retention(), DEVICE, told.append, lambda: next(asked)))
    assert len(told) == 2
    assert not list(directories.data.rglob("*.bin")) and not directories.registry.exists()
