import os
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import RankLost, Unavailable
from tests.ring_processes import in_ranks, ring, start
from tests.waiting import HANG_S
from trainer_service.training.ranks import Ranks

TEXT = "Grüße, " * 1000


def exchange() -> dict[str, Any]:
    ranks = Ranks.join()
    own = 1.0 + ranks.rank
    narrow = mx.full((5,), -own, mx.bfloat16)
    gradients = {"first": [mx.full((3, 2), own), mx.array([own])], "second": {"third": narrow}}
    loss, total, flag = ranks.sum(mx.array(own), gradients, mx.array(float(ranks.rank == 1)))
    return {
        "place": (ranks.rank, ranks.count),
        "rows": ranks.rows(5),
        "sums": (loss.item(), flag.item()),
        "gradients": [np.array(each) for each in (*total["first"], total["second"]["third"])],
        "text": ranks.share(TEXT if ranks.rank == 0 else "another"),
        "empty": ranks.share(),
        "arrays": [np.array(ranks.share_array(mx.arange(size) * (own + 1))) for size in (1, 7)],
        "agree": (ranks.agree(mx.array([1.5, float("nan")])), ranks.agree(mx.array([1.5, own]))),
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_add_share_and_compare(count: int, tmp_path: Path) -> None:
    results = in_ranks(count, exchange, tmp_path)
    total = count * (count + 1) / 2
    assert [each["place"] for each in results] == [(rank, count) for rank in range(count)]
    assert [each["rows"] for each in results] == {2: [(0, 2), (2, 5)], 3: [(0, 1), (1, 3), (3, 5)]}[count]
    for each in results:
        assert each["sums"] == (total, 1)
        expected = [np.full((3, 2), total), [total], np.full(5, -total)]
        for array, sum_ in zip(each["gradients"], expected, strict=True):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, sum_)
        assert each["text"] == TEXT and each["empty"] == ""
        for array, size in zip(each["arrays"], (1, 7), strict=True):
            np.testing.assert_array_equal(array, np.arange(size) * 2)
        assert each["agree"] == (True, False)


def leave_or_wait() -> str:
    ranks = Ranks.join()
    if ranks.rank == 1:
        os._exit(9)
    with pytest.raises(RankLost) as lost, ranks.guard():
        mx.eval(ranks.sum(mx.array(1.0), {"weight": mx.ones(9)}, mx.array(0.0)))
    with pytest.raises(RankLost):
        ranks.share("text")
    return str(lost.value)


@pytest.mark.slow
def test_a_lost_rank_is_an_error_in_the_others(tmp_path: Path) -> None:
    assert in_ranks(2, leave_or_wait, tmp_path, codes=[0, 9]) == [
        "Rank 0 of 2 has lost the connection to another rank.",
        None,
    ]


def leave_or_share(call: str) -> str:
    ranks = Ranks.join()
    if ranks.rank == 1:
        os._exit(9)
    with pytest.raises(RankLost) as lost:
        ranks.share("text") if call == "share" else ranks.agree(mx.ones(3))
    return str(lost.value)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["share", "agree"])
def test_a_lost_rank_ends_the_wait_for_its_numbers(call: str, tmp_path: Path) -> None:
    assert in_ranks(2, leave_or_share, tmp_path, call, codes=[0, 9])[0]


def join_within_a_second() -> None:
    Ranks.join(1)


@pytest.mark.slow
def test_a_rank_does_not_wait_for_ever_for_the_others(tmp_path: Path) -> None:
    with ring(2, tmp_path) as environments:
        process = start(join_within_a_second, [], tmp_path / "result", environments[0])
        assert process.wait(HANG_S) == -signal.SIGALRM
        process.stderr.close()


def test_a_rank_without_an_environment_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_HOSTFILE", "MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(Unavailable, match=r"cannot form a group: .* The environment has MLX_RANK='1'\."):
        Ranks.join()


def test_a_rank_that_is_alone_changes_nothing() -> None:
    ranks = Ranks.alone()
    loss, flag, gradients = mx.array(1.0), mx.array(0.0), {"weight": mx.ones(3, mx.bfloat16)}
    given = ranks.sum(loss, gradients, flag)
    assert given[0] is loss and given[1] is gradients and given[2] is flag
    assert ranks.rows(7) == (0, 7) and ranks.share("text") == "text" and ranks.agree(loss)
    assert ranks.share_array(loss) is loss
    with pytest.raises(RuntimeError, match="other"), ranks.guard():
        raise RuntimeError("[ring] something other")
