"""Versions that take over from one another under streams, as `make soak-swap` lets a hundred of them."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import TINY
from tests.soak.swap import start, swap

pytestmark = pytest.mark.slow


def test_no_stream_notices_that_versions_take_over(tmp_path: Path) -> None:
    """Each is the same, bit for bit, as the same stream without swaps, and on one version from start to end."""
    server = start(tmp_path / "var", slots=8)
    try:
        run = asyncio.run(swap(server, replace(TINY, context_length=256), streams=8, swaps=4, tokens=80, steady_s=0.5))
        page = server.metrics()
    finally:
        assert server.end() == 0, server.lines
    run.check_memory()
    assert run.violations == []
    assert page["gptloop_inference_swaps_total",] == 6
    assert page["gptloop_inference_swap_duration_seconds_count",] == 6
    assert page["gptloop_inference_commit_to_serving_seconds_count",] == 7
    # Of the versions that are gone nothing is left on the page; two have room.
    streams = [name for name in page if name[0] == "gptloop_inference_version_streams"]
    assert ("gptloop_inference_version_streams", str(max(run.answers))) in streams and len(streams) == 2
    assert "Traceback" not in "".join(server.lines)
