"""Builds the libraries in C++ for every kind of processor that an image may run on: `python -m deploy.prebuild`.

They go to the folder `prebuilt` of `shared/device`, where every process looks first, so that it needs no compiler.
"""

import sys

import shared.decoding.cpu.library as decoding
import trainer_service.training.cpu.library as training
from shared.device.native import PREBUILT
from shared.errors import FailedPrecondition


def main() -> int:
    """Builds all of them and returns the exit status."""
    try:
        decoding.prebuild(PREBUILT)
        training.prebuild(PREBUILT)
    except FailedPrecondition as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(sorted(path.name for path in PREBUILT.iterdir())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
