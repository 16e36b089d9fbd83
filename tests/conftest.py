import os
import signal
from pathlib import Path

import grpc.aio
import hypothesis
import pytest

from shared.device.accelerator import prepare

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")

# On CUDA, products of fp32 are computed with fewer bits unless this says otherwise; tests compare in full fp32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# The tests' models are tiny, and several processes share the cores: more threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Before any test module imports MLX. The folder outlives the run, so that kernels are compiled once.
prepare(Path(__file__).parent.parent / ".pytest_cache" / "accelerator")

# gRPC ends its polling with its last object. A collection that finds that object in the middle of a test would wait for
# calls that nobody ends any more.
grpc.aio.init_grpc_aio()

# A shell starts background commands with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    """Says at the start how long it takes."""
    fast = config.getoption("markexpr") == "not slow"
    return f"about {'one minute' if fast else 'four minutes'} with two processes (-n 2) on two quiet cores"
