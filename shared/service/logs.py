"""Logging to standard error, one line for each record."""

import logging

# These log every request, or every poll, at level INFO.
_NOISY = ("asyncio", "datasets", "filelock", "fsspec", "httpcore", "httpx", "huggingface_hub", "rq", "urllib3")


def configure(name: str) -> None:
    """Logs records of level INFO and above with time, process name, level, logger and message."""
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s.%(msecs)03d {name} %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )
    logging.captureWarnings(True)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
