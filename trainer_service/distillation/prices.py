"""What calls of a large teacher cost, in exact decimal numbers of US dollars."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from trainer_service.distillation.answers import Usage

Messages = Sequence[Mapping[str, str]]
Schema = Mapping[str, object]

# What the service adds to a conversation: its own instructions, and the marks around each message.
_FRAME_TOKENS = 256
_MESSAGE_TOKENS = 16


@dataclass(frozen=True)
class Prices:
    """The prices of a million tokens of prompts and of completions. Cached tokens of prompts count in full."""

    input_usd: Decimal
    output_usd: Decimal

    def cost(self, usage: Usage) -> Decimal:
        """Returns what a usage costs."""
        return (usage.prompt_tokens * self.input_usd + usage.completion_tokens * self.output_usd).scaleb(-6)


def most_usage(messages: Messages, max_tokens: int, schema: Schema | None = None) -> Usage:
    """Returns a usage that a call does not exceed, if its answer has at most `max_tokens` tokens.

    Every token of a tokenizer on bytes, as large models have, stands for at least one byte. The service repeats a
    schema of the answer in the prompt.
    """
    texts = [message["content"] for message in messages]
    if schema is not None:
        texts.append(json.dumps(schema))
    size_bytes = sum(len(text.encode()) for text in texts)
    return Usage(size_bytes + len(texts) * _MESSAGE_TOKENS + _FRAME_TOKENS, max_tokens)


def written(cost_usd: Decimal) -> str:
    """Returns the exact number as a ledger and a sentence write it, without an exponent, such as `0.000126`."""
    text = f"{cost_usd:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def dollars(cost_usd: Decimal) -> str:
    """Returns an amount as a sentence names it, such as `$0.50` or `$0.000126`: exact, and at least to the cent."""
    whole, _, fraction = written(cost_usd).partition(".")
    return f"${int(whole):,}.{fraction:<02}"


def about(cost_usd: Decimal) -> str:
    """Returns an amount to a hundredth of a cent, such as `$0.0312`."""
    return dollars(cost_usd.quantize(Decimal("0.0001")))
