"""A local service that answers like Groq's API, fails as it does, and keeps its own bill."""

import json
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from tests.waiting import HANG_S
from trainer_service.distillation.answers import Usage
from trainer_service.distillation.groq_settings import GroqSettings
from trainer_service.distillation.prices import Prices

KEY = "gsk_a-key-that-only-the-local-service-knows"
MODEL = "openai/gpt-oss-20b"
PRICES = Prices(Decimal("0.075"), Decimal("0.30"))
REASONING_TOKENS = 40


class Outcome(Enum):
    """What the service does with a call."""

    ANSWER = auto()
    # Charged for, without a usable answer.
    EMPTY = auto()
    TRUNCATED = auto()
    MALFORMED = auto()
    NOT_VALID = auto()
    UNREADABLE = auto()
    # Charged for, although the client never learns it.
    HANG = auto()
    DROP = auto()
    BAD_GATEWAY = auto()
    GATEWAY_UNAVAILABLE = auto()
    GATEWAY_TIMEOUT = auto()
    CLIENT_CLOSED = auto()
    # Not charged for.
    UNAVAILABLE = auto()
    MINUTE_LIMIT = auto()
    DAY_LIMIT = auto()
    TOO_LARGE = auto()


CHARGED = list(Outcome)[: list(Outcome).index(Outcome.UNAVAILABLE)]
# The statuses with which a gateway answers when the service has done the work and the answer is lost on the way.
_GATEWAY = {
    Outcome.BAD_GATEWAY: 502,
    Outcome.GATEWAY_UNAVAILABLE: 503,
    Outcome.GATEWAY_TIMEOUT: 408,
    Outcome.CLIENT_CLOSED: 499,
}
# How long the limits of a minute and of a day ask to wait.
MINUTE_WAIT, DAY_WAIT = "50ms", "7h12m3.5s"


def write_story(body: Mapping[str, Any]) -> str:
    """Returns a text that follows from the question."""
    question = str(body["messages"][-1]["content"])
    return f"There was a word.\n\n{question[::-1]}\n\nThat was all."


@dataclass(frozen=True)
class Call:
    """A call that the service has taken: its model, its question, what became of it, and what it was charged."""

    model: str
    question: str
    outcome: Outcome
    cost_usd: Decimal


class GroqService:
    """Takes calls on 127.0.0.1 while it runs.

    script: what becomes of the next calls; without it, each is answered.
    write: returns the text of an answer to a request.
    calls: every call with a valid key, in the order of their arrival.
    answering: while it is cleared, answers wait; `latency_s` delays each one.
    tokens_per_minute, requests_per_day: the limits that the headers report.
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], str] = write_story) -> None:
        self.script: deque[Outcome] = deque()
        self.write = write
        self.calls: list[Call] = []
        self.answering = threading.Event()
        self.answering.set()
        self.latency_s = 0.0
        self.tokens_per_minute = 1_000_000
        self.requests_per_day = 500_000
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def settings(self) -> GroqSettings:
        """The settings with which a client reaches the service."""
        return GroqSettings(KEY, url=self.url, input_usd=PRICES.input_usd, output_usd=PRICES.output_usd)

    @property
    def environment(self) -> dict[str, str]:
        """The same settings as environment variables."""
        return {
            "GROQ_API_KEY": KEY,
            "GPTLOOP_GROQ_URL": self.url,
            "GPTLOOP_GROQ_INPUT_USD": str(PRICES.input_usd),
            "GPTLOOP_GROQ_OUTPUT_USD": str(PRICES.output_usd),
        }

    @property
    def bill_usd(self) -> Decimal:
        """What all calls were charged."""
        with self._lock:
            return sum((call.cost_usd for call in self.calls), Decimal(0))

    def charged(self) -> Counter[tuple[str, str]]:
        """Returns how often each question to each model was charged for."""
        with self._lock:
            return Counter((call.model, call.question) for call in self.calls if call.cost_usd)

    @contextmanager
    def running(self) -> Iterator["GroqService"]:
        """Runs the service on a thread."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="groq service")
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self.answering.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def respond(self, request: "_Request", body: Mapping[str, Any]) -> None:
        """Decides what becomes of a call, charges for it, and answers."""
        with self._lock:
            outcome = self.script.popleft() if self.script else Outcome.ANSWER
            text = self.write(body)
            usage = _usage(body, text, outcome)
            cost_usd = PRICES.cost(usage) if outcome in CHARGED else Decimal(0)
            self.calls.append(Call(body["model"], body["messages"][-1]["content"], outcome, cost_usd))
            number = len(self.calls)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            self._ended.wait(self.latency_s)
            self.answering.wait(HANG_S)
            self._send(request, outcome, body, text, usage, number)
        finally:
            with self._lock:
                self._open -= 1

    def _send(
        self, request: "_Request", outcome: Outcome, body: Mapping[str, Any], text: str, usage: Usage, number: int
    ) -> None:
        limit = "Rate limit reached for model `{}` in organization `org_01` service tier `on_demand` on".format(
            body["model"]
        )
        match outcome:
            case Outcome.HANG:
                self._ended.wait(HANG_S)
                request.drop()
            case Outcome.DROP:
                request.drop()
            case Outcome.UNREADABLE:
                request.answer(200, b"<html>A page of a proxy</html>", {"content-type": "text/html"})
            case Outcome.BAD_GATEWAY | Outcome.GATEWAY_UNAVAILABLE | Outcome.GATEWAY_TIMEOUT | Outcome.CLIENT_CLOSED:
                content = b"<html>A page of a gateway</html>"
                request.answer(_GATEWAY[outcome], content, {"content-type": "text/html"})
            case Outcome.UNAVAILABLE:
                request.refuse(503, "The model is over capacity.", "internal_server_error", "")
            case Outcome.NOT_VALID:
                request.refuse(400, "Failed to generate JSON.", "invalid_request_error", "json_validate_failed")
            case Outcome.MINUTE_LIMIT:
                message = f"{limit} tokens per minute (TPM): Limit 8000, Used 7900, Requested 1500. "
                again = f"Please try again in {MINUTE_WAIT}. Need more tokens? Upgrade to Dev Tier today."
                request.refuse(429, message + again, "tokens", "rate_limit_exceeded", {"retry-after": "1"})
            case Outcome.DAY_LIMIT:
                message = f"{limit} tokens per day (TPD): Limit 200000, Used 199900, Requested 1500. "
                again = f"Please try again in {DAY_WAIT}. Need more tokens? Upgrade to Dev Tier today."
                request.refuse(429, message + again, "tokens", "rate_limit_exceeded", {"retry-after": "25923"})
            case Outcome.TOO_LARGE:
                message = (
                    f"Request too large for model `{body['model']}` in organization `org_01` service tier `on_demand` "
                    "on tokens per minute (TPM): Limit 1000, Requested 1500, please reduce your message size and try "
                    "again."
                )
                request.refuse(413, message, "tokens", "rate_limit_exceeded")
            case _:
                completion = _completion(outcome, body, text, usage, number)
                request.answer(200, json.dumps(completion).encode(), self._headers(usage, number))

    def _headers(self, usage: Usage, number: int) -> dict[str, str]:
        taken = usage.prompt_tokens + usage.completion_tokens
        return {
            "content-type": "application/json",
            "x-ratelimit-limit-requests": str(self.requests_per_day),
            "x-ratelimit-remaining-requests": str(max(self.requests_per_day - number, 0)),
            "x-ratelimit-reset-requests": f"{86400 * number / self.requests_per_day:.3f}s",
            "x-ratelimit-limit-tokens": str(self.tokens_per_minute),
            "x-ratelimit-remaining-tokens": str(max(self.tokens_per_minute - taken, 0)),
            "x-ratelimit-reset-tokens": f"{60000 * taken / self.tokens_per_minute:.0f}ms",
        }


def _usage(body: Mapping[str, Any], text: str, outcome: Outcome) -> Usage:
    prompt = sum(len(message["content"]) for message in body["messages"]) // 4 + 70
    if outcome in (Outcome.EMPTY, Outcome.TRUNCATED):
        most = body["max_completion_tokens"]
        return Usage(prompt, most, most if outcome is Outcome.EMPTY else REASONING_TOKENS)
    return Usage(prompt, len(text) // 4 + REASONING_TOKENS, REASONING_TOKENS)


def _completion(outcome: Outcome, body: Mapping[str, Any], text: str, usage: Usage, number: int) -> dict[str, Any]:
    content = {Outcome.EMPTY: "", Outcome.TRUNCATED: text[:50], Outcome.MALFORMED: '{"winner": "A'}.get(outcome, text)
    message = {"role": "assistant", "content": content}
    is_cut = outcome in (Outcome.EMPTY, Outcome.TRUNCATED)
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": body["model"],
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": "length" if is_cut else "stop"}
        ],
        "usage": {
            "queue_time": 0.01,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        },
        "system_fingerprint": "fp_local",
        "x_groq": {"id": f"req_{number}"},
        "service_tier": "on_demand",
    }


class _Request(BaseHTTPRequestHandler):
    """A connection of a client, which may make several calls."""

    protocol_version = "HTTP/1.1"
    service: GroqService

    def handle(self) -> None:
        """Takes calls until the client leaves, in whatever way."""
        with suppress(ConnectionError):
            super().handle()

    def do_POST(self) -> None:
        """Takes a call."""
        size_bytes = int(self.headers["content-length"])
        raw = self.rfile.read(size_bytes)
        if len(raw) < size_bytes:
            # The client was killed before it had sent everything.
            self.drop()
        elif self.headers.get("authorization") != f"Bearer {KEY}":
            self.refuse(401, "Invalid API Key", "invalid_request_error", "invalid_api_key")
        elif self.path != "/openai/v1/chat/completions":
            self.refuse(404, f"Unknown request URL: POST {self.path}.", "invalid_request_error", "unknown_url")
        elif finding := _finding(body := json.loads(raw)):
            code = "model_not_found" if "model" in finding else ""
            self.refuse(404 if code else 400, finding, "invalid_request_error", code)
        else:
            self.service.respond(self, body)

    def answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        """Sends a response, if the client still waits for it."""
        with suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def refuse(self, status: int, message: str, kind: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        """Sends an error in the form of the API."""
        error = {"message": message, "type": kind} | ({"code": code} if code else {})
        content = json.dumps({"error": error}).encode()
        self.answer(status, content, {"content-type": "application/json", **(headers or {})})

    def drop(self) -> None:
        """Ends the connection without a response."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def _handler(service: GroqService) -> type[_Request]:
    return type("_BoundRequest", (_Request,), {"service": service})


def _finding(body: Mapping[str, Any]) -> str:
    """Returns what the API would reject in a request; an empty text if it is valid."""
    if not str(body["model"]).startswith("openai/"):
        return f"The model `{body['model']}` does not exist or you do not have access to it."
    known = {
        *("model", "messages", "max_completion_tokens", "temperature", "reasoning_effort", "include_reasoning"),
        "response_format",
    }
    if unknown := set(body) - known:
        return f"property {sorted(unknown)[0]!r} is unsupported"
    if not 0 < body["max_completion_tokens"] <= 65536:
        return "`max_completion_tokens` must be less than or equal to `65536`"
    form = body.get("response_format")
    return _schema_finding(form["json_schema"]["schema"]) if form and form["json_schema"]["strict"] else ""


def _schema_finding(schema: Mapping[str, Any]) -> str:
    """Returns what strict mode would reject in a schema."""
    if schema.get("type") == "object":
        properties = cast(Mapping[str, Any], schema.get("properties", {}))
        if schema.get("additionalProperties") is not False:
            return "invalid JSON schema for response_format: `additionalProperties:false` must be set on every object"
        if set(schema.get("required", ())) != set(properties):
            return "invalid JSON schema for response_format: all properties must be in `required`"
        inner: Iterable[Mapping[str, Any]] = properties.values()
        return next((finding for each in inner if (finding := _schema_finding(each))), "")
    return ""
