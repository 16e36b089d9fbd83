from collections import Counter
from decimal import Decimal

from tests.groq_service import MODEL, PRICES
from trainer_service.distillation.estimate import estimate
from trainer_service.distillation.ledger import Account
from trainer_service.distillation.prices import Prices
from trainer_service.jobs.specs import StoriesSpec


def test_a_new_set_is_estimated_from_a_typical_story_and_from_the_worst_case() -> None:
    said = estimate(StoriesSpec("s", 2000, 0.5), Account(), PRICES, MODEL)
    # 250 tokens of a prompt and 450 of an answer.
    assert said.startswith("2,000 more stories by openai/gpt-oss-20b cost typically $0.3075 and at most $0.")
    assert "; the cap of $0.50 typically pays for 2,000 of them, and surely for 1," in said
    small = estimate(StoriesSpec("s", 2000, 0.01), Account(), PRICES, MODEL)
    assert small.endswith("the cap of $0.01 typically pays for 65 of them, and surely for 26.")


def test_a_set_that_has_stories_is_estimated_from_them() -> None:
    account = Account(
        spent_usd=Decimal("0.012"),
        answered=100,
        answered_usd=Decimal("0.008"),
        refused=Counter(empty=2),
        refused_usd=Decimal("0.002"),
    )
    said = estimate(StoriesSpec("s", 600, 0.022), account, PRICES, MODEL)
    assert said.startswith(
        "The set has 100 stories for $0.012. 500 more stories by openai/gpt-oss-20b cost typically $0.05 "
    )
    assert "the cap of $0.022 typically pays for 100 of them" in said


def test_a_set_that_lacks_none_costs_nothing() -> None:
    account = Account(spent_usd=Decimal("0.01"), answered=100)
    said = "The set s has 100 stories already, for $0.01."
    assert estimate(StoriesSpec("s", 100, 0.5), account, PRICES, MODEL) == said


def test_stories_for_nothing_are_all_paid_for() -> None:
    free = Prices(Decimal(0), Decimal(0))
    said = estimate(StoriesSpec("s", 10, 0.5), Account(), free, MODEL)
    assert said.endswith(
        "cost typically $0.00 and at most $0.00; the cap of $0.50 typically pays for 10 of them, and surely for 10."
    )
