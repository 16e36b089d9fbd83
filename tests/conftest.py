from pathlib import Path

from shared.accelerator import prepare

# Before any test module imports MLX. The folder outlives the run, so that kernels are compiled once.
prepare(Path(__file__).parent.parent / ".pytest_cache" / "accelerator")
