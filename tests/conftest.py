import os
from pathlib import Path

import hypothesis

from shared.accelerator import prepare

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")

# On CUDA, products of fp32 are computed with fewer bits unless this says otherwise; tests compare in full fp32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# The tests' models are tiny, and several processes share the cores: more threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Before any test module imports MLX. The folder outlives the run, so that kernels are compiled once.
prepare(Path(__file__).parent.parent / ".pytest_cache" / "accelerator")
