"""Runs the command `gptloop` from any folder: state stays in the project, and paths are relative to that folder."""

import os
from pathlib import Path
from typing import NoReturn

from shared.service import grpc_logs, interrupts

_PROJECT = Path(__file__).parent.parent


def main() -> NoReturn:
    """Runs the command that the arguments of this process name, and exits with its code."""
    # Before the modules that take long to load.
    interrupts.end_quietly()
    grpc_logs.silence()
    from deploy.commands import app
    from shared.service import cli

    if not os.environ.get("GPTLOOP_VAR", "").strip():
        os.environ["GPTLOOP_VAR"] = str(_PROJECT / "var")
    cli.run(app)


if __name__ == "__main__":
    main()
