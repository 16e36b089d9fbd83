"""Asks a large model through Groq's API, and classifies every outcome."""

from types import TracebackType
from typing import Self

from trainer_service.distillation.answers import Answer
from trainer_service.distillation.prices import Messages, Schema
from trainer_service.settings import GroqSettings


class GroqTeacher:
    """A client of Groq's API that makes each call once; use it in an `async with` block.

    Raises `FailedPrecondition` if there is no key.
    """

    def __init__(self, settings: GroqSettings) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        raise NotImplementedError

    async def ask(self, messages: Messages, max_tokens: int, schema: Schema | None = None) -> Answer:
        """Returns the answer to messages, of at most `max_tokens` tokens with its reasoning; raises `Refused`.

        schema: the JSON schema to which the text of the answer conforms; all its fields are required, and it allows no
          others.
        """
        raise NotImplementedError
