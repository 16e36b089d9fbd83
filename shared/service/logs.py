"""Logging: one line a record on standard error."""

import logging

# These tell of every request, or of every poll, at level INFO.
_NOISY = ("asyncio", "datasets", "filelock", "fsspec", "httpcore", "httpx", "huggingface_hub", "rq", "urllib3")


def configure(name: str) -> None:
    """Writes records of level INFO and above as lines of time, process name, level, logger and message."""
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s.%(msecs)03d {name} %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )
    logging.captureWarnings(True)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
