import shutil
from pathlib import Path

import pytest

from tests.trainer_service.huggingface.gpt2_folders import END, TIED, random_model
from trainer_service.huggingface.gpt2 import write_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tied model. Tests must not change it."""
    directory = tmp_path_factory.mktemp("published")
    write_model(random_model(TIED), END, directory)
    return directory


@pytest.fixture
def model_copy(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))
