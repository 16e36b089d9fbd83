"""What gRPC's core writes to standard error, past Python's logging."""

import os


def silence() -> None:
    """Keeps gRPC from writing lines of its own, such as one for each failed handshake; call it before gRPC is imported.

    Its failures are errors of calls anyway. `GRPC_VERBOSITY` in the environment overrides this.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
