"""What a set of stories will cost, before it is paid for."""

from decimal import Decimal

from trainer_service.distillation.answers import Usage
from trainer_service.distillation.ledger import Account
from trainer_service.distillation.prices import Prices, about, dollars, most_usage
from trainer_service.distillation.prompts import MAX_TOKENS, draw_prompt
from trainer_service.jobs.specs import StoriesSpec

# A story of a child's book with a little reasoning, before the set itself shows what its stories take.
_TYPICAL = Usage(prompt_tokens=250, completion_tokens=450)
# So many answers show what the others will take.
_ENOUGH_ANSWERS = 20
# The longest of this many prompts is about as long as the longest of all.
_PROMPTS = 200


def estimate(spec: StoriesSpec, account: Account, prices: Prices, model: str) -> str:
    """Returns a sentence on what the stories that a set lacks will cost, and on how many of them its cap pays for."""
    lacking = max(spec.count - account.answered, 0)
    if not lacking:
        return f"The set {spec.name} has {account.answered:,} stories already, for {dollars(account.spent_usd)}."
    longest = max((most_usage(draw_prompt(n).messages(), MAX_TOKENS) for n in range(_PROMPTS)), key=prices.cost)
    most_usd = prices.cost(longest)
    typical_usd = prices.cost(_TYPICAL)
    if account.answered >= _ENOUGH_ANSWERS:
        typical_usd = account.charged_usd / account.answered
    left_usd = max(spec.cap_usd - account.spent_usd, Decimal(0))
    before = f"The set has {account.answered:,} stories for {dollars(account.spent_usd)}. " if account.answered else ""
    pays = min(int(left_usd / typical_usd), lacking) if typical_usd else lacking
    surely = min(int(left_usd / most_usd), lacking) if most_usd else lacking
    return (
        f"{before}{lacking:,} more stories by {model} cost typically {about(typical_usd * lacking)} and at most "
        f"{about(most_usd * lacking)}; the cap of {dollars(spec.cap_usd)} typically pays for {pays:,} of them, and "
        f"surely for {surely:,}."
    )
