"""What the trainer service reads from the environment about the large teacher."""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from shared.errors import FailedPrecondition, InvalidArgument, shown
from shared.service.settings import Environment, read_str
from trainer_service.distillation.prices import Prices

_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_PRICE = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")
_KEY = re.compile(r"[!-~]{1,512}")


@dataclass(frozen=True)
class GroqSettings:
    """The large teacher: how to reach it, and what it costs.

    key: `GROQ_API_KEY`, the key of the account; empty if it is not set.
    key_file: `GPTLOOP_GROQ_KEY_FILE`, a file that holds the key.
    url: `GPTLOOP_GROQ_URL`, the address of the service.
    model: `GPTLOOP_GROQ_MODEL`, the model that answers.
    input_usd, output_usd: `GPTLOOP_GROQ_INPUT_USD` and `GPTLOOP_GROQ_OUTPUT_USD`, the prices of a million tokens of
      prompts and of answers in US dollars; None if they are not set.
    """

    key: str = field(default="", repr=False)
    key_file: str = ""
    url: str = "https://api.groq.com"
    model: str = "openai/gpt-oss-20b"
    input_usd: Decimal | None = None
    output_usd: Decimal | None = None

    def read_key(self) -> str:
        """Returns the key; raises `FailedPrecondition`, which never quotes a key, if there is none."""
        place, key = "GROQ_API_KEY", self.key
        if not key and self.key_file:
            place = f"The file {shown(self.key_file)} of GPTLOOP_GROQ_KEY_FILE"
            try:
                key = Path(self.key_file).read_text(encoding="utf-8", errors="replace").strip()
            except OSError as error:
                raise FailedPrecondition(f"{place} cannot be read: {error.strerror}.") from None
        elif not key:
            raise FailedPrecondition(
                "There is no key for Groq: set GROQ_API_KEY, or GPTLOOP_GROQ_KEY_FILE to a file that holds it, before "
                "`gptloop up`."
            )
        if not _KEY.fullmatch(key):
            raise FailedPrecondition(f"{place} holds no key, which is one word of letters, digits and signs.")
        return key

    def prices(self) -> Prices:
        """Returns the prices; raises `FailedPrecondition` if they are not set."""
        if self.input_usd is None or self.output_usd is None:
            name = "GPTLOOP_GROQ_INPUT_USD" if self.input_usd is None else "GPTLOOP_GROQ_OUTPUT_USD"
            raise FailedPrecondition(
                f"{name} is not set, so nothing is paid for: set it to the price of a million tokens of "
                f"{self.model} in US dollars, as Groq lists it."
            )
        return Prices(self.input_usd, self.output_usd)


def read_groq(environment: Environment) -> GroqSettings:
    """Reads what concerns the large teacher; raises `InvalidArgument`, which names the invalid variable."""
    default = GroqSettings()
    url = read_str(environment, "GPTLOOP_GROQ_URL", default.url)
    if not _URL.fullmatch(url):
        # The message does not repeat the address, which may contain a password.
        raise InvalidArgument(f"GPTLOOP_GROQ_URL must be an address such as {default.url}, without a name or a query.")
    return GroqSettings(
        key=read_str(environment, "GROQ_API_KEY", ""),
        key_file=read_str(environment, "GPTLOOP_GROQ_KEY_FILE", ""),
        url=url,
        model=read_str(environment, "GPTLOOP_GROQ_MODEL", default.model),
        input_usd=_read_price(environment, "GPTLOOP_GROQ_INPUT_USD"),
        output_usd=_read_price(environment, "GPTLOOP_GROQ_OUTPUT_USD"),
    )


def _read_price(environment: Environment, name: str) -> Decimal | None:
    text = read_str(environment, name, "")
    # With a price of 0 no cap would ever be reached.
    if text and not (_PRICE.fullmatch(text) and Decimal(text)):
        raise InvalidArgument(
            f"{name} is {shown(text)}, but must be the price of a million tokens in US dollars, above 0, such as 0.30."
        )
    return Decimal(text) if text else None
