"""A finished generation as one value."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from shared.pb.inference.v1 import inference_pb2 as pb

Event = pb.Started | pb.PromptRead | pb.Delta | pb.Finished


class FinishReason(Enum):
    """Why a sample ended, with the numbers of the contract."""

    EOS = pb.FINISH_REASON_EOS
    LENGTH = pb.FINISH_REASON_LENGTH
    STOP = pb.FINISH_REASON_STOP
    CONTEXT_LENGTH = pb.FINISH_REASON_CONTEXT_LENGTH
    CANCELLED = pb.FINISH_REASON_CANCELLED
    DEADLINE = pb.FINISH_REASON_DEADLINE


@dataclass(frozen=True)
class Sample:
    """One continuation of the prompt. Times count from the arrival of the request at the server.

    `logprobs` has one entry per token if the request asked for them, and is empty otherwise. A request with n = 1 and
    this `seed` reproduces the text in the same format of weights.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprobs, ...]
    finish_reason: FinishReason
    matched_stop: str | None
    seed: int
    generated_tokens: int
    cached_prompt_tokens: int
    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True)
class Completion:
    """The result of one request: its samples by index, and the version and seed that produced them.

    `prompt_logprobs` has one entry per token of the prompt if the request asked for them, the first with the rank 0.
    """

    request_id: str
    version: int
    seed: int
    prompt_tokens: int
    prompt_logprobs: tuple[pb.TokenLogprobs, ...]
    samples: tuple[Sample, ...]

    @property
    def text(self) -> str:
        """Returns the text of the first sample."""
        return self.samples[0].text


def complete(events: Sequence[Event]) -> Completion:
    """Returns the completion of a stream that was read to its end."""
    (started,) = (event for event in events if isinstance(event, pb.Started))
    deltas = [event for event in events if isinstance(event, pb.Delta)]
    ends = [event for event in events if isinstance(event, pb.Finished)]
    return Completion(
        request_id=started.request_id,
        version=started.model_version,
        seed=started.seed,
        prompt_tokens=started.prompt_tokens,
        prompt_logprobs=tuple(each for event in events if isinstance(event, pb.PromptRead) for each in event.logprobs),
        samples=tuple(
            _sample(started, [delta for delta in deltas if delta.index == end.index], end)
            for end in sorted(ends, key=lambda end: end.index)
        ),
    )


def sample_seed(started: pb.Started, index: int) -> int:
    """Returns the seed that reproduces a single sample; seeds have 64 bits."""
    return (started.seed + index) % 2**64


def _sample(started: pb.Started, deltas: Sequence[pb.Delta], end: pb.Finished) -> Sample:
    return Sample(
        index=end.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprobs for delta in deltas for logprobs in delta.logprobs),
        finish_reason=FinishReason(end.reason),
        matched_stop=end.matched_stop or None,
        seed=sample_seed(started, end.index),
        generated_tokens=end.generated_tokens,
        cached_prompt_tokens=end.cached_prompt_tokens,
        queue_s=end.queue_seconds,
        time_to_first_token_s=end.time_to_first_token_seconds,
        total_s=end.total_seconds,
    )
