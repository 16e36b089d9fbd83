from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_service.distillation.answers import Usage
from trainer_service.distillation.prices import Prices, about, dollars, most_usage, written

PRICES = Prices(Decimal("0.075"), Decimal("0.30"))


def test_a_usage_costs_what_its_tokens_cost() -> None:
    assert PRICES.cost(Usage(1_000_000, 0)) == Decimal("0.075")
    assert PRICES.cost(Usage(0, 1_000_000)) == Decimal("0.30")
    assert PRICES.cost(Usage(1, 1)) == Decimal("0.000000375")
    assert PRICES.cost(Usage(0, 0)) == 0


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=200))
def test_sums_of_costs_are_exact(counts: list[tuple[int, int]]) -> None:
    total = sum((PRICES.cost(Usage(*each)) for each in counts), Decimal(0))
    assert total == PRICES.cost(Usage(sum(each[0] for each in counts), sum(each[1] for each in counts)))


@given(st.text(max_size=200))
def test_a_prompt_has_no_more_tokens_than_its_worst_case(text: str) -> None:
    text = text.encode(errors="replace").decode()
    messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    most = most_usage(messages, 1024)
    assert 2 * len(text.encode()) < most.prompt_tokens and most.completion_tokens == 1024
    assert most_usage(messages, 1024, {"type": text}).prompt_tokens > most.prompt_tokens


@pytest.mark.parametrize(
    ("cost", "exact", "sentence"),
    [
        ("0", "0", "$0.00"),
        ("0.5", "0.5", "$0.50"),
        ("0.50", "0.5", "$0.50"),
        ("1E+1", "10", "$10.00"),
        ("1234.5", "1234.5", "$1,234.50"),
        ("0.000000375", "0.000000375", "$0.000000375"),
    ],
)
def test_amounts_are_written_exactly(cost: str, exact: str, sentence: str) -> None:
    assert (written(Decimal(cost)), dollars(Decimal(cost))) == (exact, sentence)


def test_progress_names_a_rounded_amount() -> None:
    assert (about(Decimal("0.03123")), about(Decimal("2"))) == ("$0.0312", "$2.00")
