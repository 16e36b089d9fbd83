"""Finds the names of all environment variables that configure a process."""

from collections.abc import Iterator, Mapping

import inference_service.settings
import trainer_service.settings

# Read by the libraries below the services.
_OF_LIBRARIES = ("OPENBLAS_NUM_THREADS", "TIKTOKEN_CACHE_DIR")


def known_settings() -> set[str]:
    """Returns the name of every variable that the services read."""
    environment = _Recorder()
    inference_service.settings.read_settings(environment)
    trainer_service.settings.read_settings(environment)
    return environment.names.union(_OF_LIBRARIES)


class _Recorder(Mapping[str, str]):
    """An empty environment that records the names that it is asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
