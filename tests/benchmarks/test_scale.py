import pytest

from tests.benchmarks import scale
from tests.benchmarks.scale import NETWORKS, all_reduce_s, efficiency, pause_share, step_s
from tests.workplace import PROJECT

PAGE = (PROJECT / "deploy/scale.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("|")]
    for rows in (scale.training_rows(), scale.pause_rows(), scale.service_rows(), scale.copy_rows(), scale.look_rows()):
        for row in rows:
            assert row in lines, row


def test_the_line_of_steps_goes_through_what_was_measured() -> None:
    assert step_s(12) == pytest.approx(0.0110) and step_s(64) == pytest.approx(0.0237)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_more_ranks_take_longer_to_add_and_one_takes_no_time(network: scale.Network) -> None:
    times = [all_reduce_s(ranks, network) for ranks in (1, 2, 8, 100)]
    assert times == sorted(times) and times[0] == 0.0
    # Two ranks send all gradients once in each direction.
    assert times[1] == pytest.approx(scale.VERSION_BYTES / network.bytes_per_s, abs=1e-3)
    assert efficiency(1, 64, network) == 1.0 > efficiency(8, 64, network) > efficiency(8, 12, network)


def test_a_pause_costs_less_if_steps_take_longer() -> None:
    assert pause_share(1, NETWORKS[0], 1e9) > pause_share(8, NETWORKS[3], 1e9)
