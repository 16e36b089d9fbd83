"""Asks a large model through Groq's API, and classifies every outcome."""

import asyncio
import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import groq
import httpx

from shared.errors import shown
from trainer_service.distillation.answers import Answer, Kind, Refused, Usage
from trainer_service.distillation.groq_settings import GroqSettings
from trainer_service.distillation.prices import Messages, Schema, most_usage
from trainer_service.distillation.rate_limits import RateLimits, read_limit

_CONNECT_S = 10.0
# Failures before the service has the question.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)
# Groq says by "unavailable" and its own "capacity exceeded" that it has not begun the work. A gateway on the way says
# so too, although the work may have been done.
_NOT_BEGUN = (498, 503)
# Work that was given up on the way, of which nobody knows how much was done.
_GIVEN_UP = (408, 499)
_LIMITED = (413, 429)
# The code of an answer that does not conform to the schema; the work was done.
_NOT_VALID = "json_validate_failed"


class GroqTeacher:
    """A client of Groq's API that makes each call once; use it in an `async with` block.

    `limits` are those that the answers report. `timeout_s` is the longest time of a call. Raises `FailedPrecondition`
    if there is no key. No key ever enters an error or a log.
    """

    def __init__(self, settings: GroqSettings, timeout_s: float = 60.0) -> None:
        self.model = settings.model
        self.limits = RateLimits()
        self._key = settings.read_key()
        self._url = settings.url
        self._timeout_s = timeout_s
        # Neither the client nor a redirection repeats a call, which would be paid for twice.
        self._client = groq.AsyncGroq(
            api_key=self._key,
            base_url=settings.url,
            max_retries=0,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            http_client=groq.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()

    def parameters(self, max_tokens: int, temperature: float) -> dict[str, object]:
        """Returns the parameters of a call, beside its model and messages."""
        parameters: dict[str, object] = {"max_completion_tokens": max_tokens, "temperature": temperature}
        if self.model.startswith("openai/gpt-oss"):
            # These models reason before they answer, and the reasoning is paid for.
            parameters |= {"reasoning_effort": "low", "include_reasoning": False}
        return parameters

    async def ask(
        self, messages: Messages, max_tokens: int, schema: Schema | None = None, temperature: float = 1.0
    ) -> Answer:
        """Returns the answer to messages, of at most `max_tokens` tokens with its reasoning; raises `Refused`.

        schema: the JSON schema to which the text of the answer conforms; all its fields are required, and it allows no
          others.
        """
        parameters: dict[str, Any] = self.parameters(max_tokens, temperature)
        if schema is not None:
            described = {"name": "answer", "strict": True, "schema": schema}
            parameters["response_format"] = {"type": "json_schema", "json_schema": described}
        most = most_usage(messages, max_tokens, schema)
        call = self.limits.begin(most.prompt_tokens + most.completion_tokens)
        headers: Mapping[str, str] = {}
        try:
            # The client limits each read; this limits the whole call.
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(
                    messages=messages,  # type: ignore[arg-type]
                    model=self.model,
                    **parameters,
                )
            headers = response.headers
            answer = _read_answer(response.http_response)
        except (TimeoutError, groq.APIConnectionError) as error:
            raise self._connection_failure(error) from None
        except groq.APIStatusError as error:
            headers = error.response.headers
            raise self._status_failure(error) from None
        finally:
            self.limits.end(call, headers, time.monotonic())
        _check_answer(answer, schema)
        return answer

    def _connection_failure(self, error: TimeoutError | groq.APIConnectionError) -> Refused:
        cause = error.__cause__
        if isinstance(cause, _NOT_SENT):
            what = str(cause) or type(cause).__name__
            return Refused(
                Kind.UNREACHABLE,
                f"Groq cannot be reached at {self._url} ({self._without_key(what)}): check the network and "
                "GPTLOOP_GROQ_URL.",
            )
        if isinstance(error, TimeoutError | groq.APITimeoutError):
            return Refused(Kind.TIMED_OUT, f"Groq has not answered within {self._timeout_s:g} s.")
        return Refused(Kind.CUT_OFF, "The connection to Groq ended before the answer.")

    def _status_failure(self, error: groq.APIStatusError) -> Refused:
        status, (message, code) = error.status_code, _read_error(error.body)
        if status in _LIMITED:
            limit = read_limit(message, error.response.headers.get("retry-after", ""))
            return Refused(limit.kind, limit.sentence, wait_s=limit.wait_s)
        if status in _NOT_BEGUN and _is_own_error(error.body):
            return Refused(Kind.UNAVAILABLE, f"Groq is not available now (status {status}).")
        if status >= 500 or status in (*_NOT_BEGUN, *_GIVEN_UP):
            return Refused(Kind.SERVER_ERROR, f"Groq has failed (status {status}).")
        if status == 400 and code == _NOT_VALID:
            return Refused(Kind.MALFORMED, "The answer does not conform to the schema.")
        if status == 401:
            return Refused(Kind.REJECTED, "Groq does not know the key: correct GROQ_API_KEY or GPTLOOP_GROQ_KEY_FILE.")
        said = f": {self._without_key(message)}" if message else ""
        return Refused(Kind.REJECTED, f"Groq rejects the call to {shown(self.model)} with the status {status}{said}.")

    def _without_key(self, text: str) -> str:
        return shown(text.replace(self._key, "…").strip().rstrip("."), 160)


def _is_own_error(body: object) -> bool:
    """Whether an error has the form of the API, and so comes from the service itself."""
    inner = body.get("error") if isinstance(body, Mapping) else None
    return isinstance(inner, Mapping) and isinstance(inner.get("message"), str)


def _read_error(body: object) -> tuple[str, str]:
    """Returns the message and the code of an error of the service; empty texts for what is missing."""
    inner = body.get("error", body) if isinstance(body, Mapping) else {"message": body}
    values = inner if isinstance(inner, Mapping) else {}
    message, code = (values.get(name) for name in ("message", "code"))
    return message if isinstance(message, str) else "", code if isinstance(code, str) else ""


def _read_answer(response: httpx.Response) -> Answer:
    """Reads a completion; what cannot be read may have been charged for."""
    try:
        body = response.json()
        (choice,) = body["choices"]
        usage = body["usage"]
        details = usage.get("completion_tokens_details") or {}
        counts = (usage["prompt_tokens"], usage["completion_tokens"], details.get("reasoning_tokens") or 0)
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("a count of tokens is no whole number")
        return Answer(
            text=str(choice["message"].get("content") or ""),
            usage=Usage(*counts),
            finish_reason=str(choice["finish_reason"]),
            model=str(body["model"]),
            fingerprint=str(body.get("system_fingerprint") or ""),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Refused(Kind.UNREADABLE, "The answer of Groq cannot be read.") from None


def _check_answer(answer: Answer, schema: Schema | None) -> None:
    if not answer.text.strip():
        raise Refused(Kind.EMPTY, "The answer is empty: the reasoning took all its tokens.", answer.usage)
    if answer.finish_reason != "stop":
        raise Refused(Kind.TRUNCATED, f"The answer is not complete ({shown(answer.finish_reason)}).", answer.usage)
    if schema is not None:
        try:
            json.loads(answer.text)
        except (ValueError, RecursionError):
            raise Refused(Kind.MALFORMED, "The answer is no JSON.", answer.usage) from None
