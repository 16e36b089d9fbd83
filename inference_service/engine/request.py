"""The requests that the engine takes and the events that it returns. Importing this loads no model framework."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache

from shared.decoding.sampling import SamplingParameters
from shared.errors import GptloopError

# A version may fail this many steps within this time.
MAX_FAILURES = 3
FAILURES_WITHIN_S = 60.0


class FinishReason(Enum):
    """Why a stream ended."""

    EOS = auto()
    LENGTH = auto()
    STOP = auto()
    CONTEXT_LENGTH = auto()
    CANCELLED = auto()
    DEADLINE = auto()


class NotFinite(GptloopError):
    """The model's logits are not finite, so no token can be drawn from them."""


class StepFailed(GptloopError):
    """The step in which the stream took part failed."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Everything that a request says about its generation and that needs no version.

    `id` is the engine's own, and `call_id` that of the call, which log lines name.
    `samples` is the number of streams that continue the prompt; it cannot exceed the number of slots. `arrived` and
    `deadline` are times of `time.monotonic`. `logprobs` is the number of alternatives that each token carries, None for
    no log-probabilities; `prompt_logprobs` is the same for the tokens of the prompt.
    """

    id: str
    call_id: str = ""
    max_tokens: int
    arrived: float
    samples: int = 1
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(GenerationOptions):
    """A request to a version: `prompt` holds at least one of its tokens and fewer than its context length.

    The sample with index i draws with the seed `seed + i`.
    """

    version: int
    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability under the model, before temperature and filters."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Draw:
    """A token that was drawn, or one of a prompt.

    `alternatives` are the likeliest tokens, likeliest first, and the likeliest has the `rank` 1.
    """

    token: int
    logprob: float | None = None
    rank: int | None = None
    alternatives: tuple[TokenLogprob, ...] = ()


@cache
def plain_draw(token: int) -> Draw:
    """Returns the draw of a token without log-probabilities; most streams have only such, thousands in a second."""
    return Draw(token)


@dataclass(frozen=True)
class Admitted:
    """The request has left the queue: all of its samples have slots."""

    at: float


@dataclass(frozen=True)
class PromptRead:
    """Tokens of the prompt from position `start` on, with their log-probabilities; the first of all has none."""

    start: int
    tokens: tuple[Draw, ...]


@dataclass(frozen=True)
class Delta:
    """Drawn tokens, each with its time, and the text that became certain with them; either may be empty."""

    times: tuple[float, ...]
    text: str
    draws: tuple[Draw, ...]

    @classmethod
    def joined(cls, deltas: Sequence["Delta"]) -> "Delta":
        """Joins consecutive deltas."""
        times = tuple(at for delta in deltas for at in delta.times)
        return cls(times, "".join(delta.text for delta in deltas), tuple(draw for d in deltas for draw in d.draws))


@dataclass(frozen=True)
class Finished:
    """The end of a stream. `cached_prompt_tokens` came from the prefix cache.

    Times are in seconds from the arrival of the request, None if the stream ended before.
    """

    reason: FinishReason
    matched_stop: str | None
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    queue_s: float | None
    first_token_s: float | None
    total_s: float


@dataclass(frozen=True)
class Failed:
    """The end of a stream by an error."""

    error: GptloopError


Event = Admitted | PromptRead | Delta | Finished | Failed


@dataclass(frozen=True)
class Output:
    """An event of one sample of a request."""

    request_id: str
    index: int
    event: Event
