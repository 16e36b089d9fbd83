"""Versions that replace one another while streams run, as a hundred of them do in `make soak-swap`."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.asynchronous import async_test
from tests.fakes import TINY
from tests.soak.swap import start, swap

pytestmark = pytest.mark.slow


@async_test
async def test_streams_do_not_notice_swaps(tmp_path: Path) -> None:
    """Each stream runs on one version, and is the same, bit for bit, as without swaps."""
    server = start(tmp_path / "var", slots=8)
    try:
        run = await swap(server, replace(TINY, context_length=256), streams=8, swaps=4, tokens=80, steady_s=0.5)
        page = server.metrics()
    finally:
        assert server.end() == 0, server.lines
    run.check_memory()
    assert run.violations == []
    assert page["gptloop_inference_swaps_total",] == 6
    assert page["gptloop_inference_swap_duration_seconds_count",] == 6
    assert page["gptloop_inference_commit_to_serving_seconds_count",] == 7
    # The page shows no version that is gone; two have room.
    streams = [name for name in page if name[0] == "gptloop_inference_version_streams"]
    assert ("gptloop_inference_version_streams", str(max(run.answers))) in streams and len(streams) == 2
    assert "Traceback" not in "".join(server.lines)
