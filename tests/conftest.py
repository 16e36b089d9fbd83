import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import hypothesis
import pytest

from shared.device.accelerator import prepare
from tests.mlx_on_cpu import speed_up_mlx
from tests.object_storage.proxy import FaultyProxy
from tests.object_storage.server import MISSING, ObjectServer, is_installed

# The time of an example depends on the machine. With the same examples in each run, a failure repeats.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("default")

# By default, CUDA computes products of fp32 with fewer bits; tests compare in full fp32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# The models of the tests are tiny, and several processes share the cores, so more threads would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Runs before any test module imports MLX. The folder is kept after the run, so that kernels are compiled once.
_CACHE = Path(__file__).parent.parent / ".pytest_cache" / "accelerator"
speed_up_mlx(_CACHE)
prepare(_CACHE)

# gRPC stops polling when its last object is deleted. If garbage collection did that during a test, it would wait for
# calls that never end.
grpc.aio.init_grpc_aio()

# A shell starts background commands with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    """Reports the expected time."""
    fast = config.getoption("markexpr") == "not slow"
    return f"about {'one minute' if fast else 'a quarter of an hour'} with two processes (-n 2) on two quiet cores"


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A real S3 server that stands for the whole session; each test takes a place of its own."""
    if not is_installed():
        pytest.skip(MISSING)
    server = ObjectServer(tmp_path_factory.mktemp("objects"))
    yield server
    server.end()


@pytest.fixture
def object_proxy(object_server: ObjectServer) -> Iterator[FaultyProxy]:
    """A proxy before that server, which fails requests as a test asks for."""
    proxy = FaultyProxy(object_server.port)
    yield proxy
    proxy.end()
