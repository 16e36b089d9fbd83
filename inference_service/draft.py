"""A request for text that is checked as far as it can be without a version. All faces of the server make it."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from inference_service.engine.request import GenerationOptions, GenerationRequest
from shared.decoding.sampling import SamplingParameters
from shared.errors import InvalidArgument
from shared.gpt.tokenizer import Tokenizer
from shared.service.log_ids import current_ids

DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Selection:
    """The version that a call selects: a number, a label, or the serving one if both are None."""

    version: int | None = None
    label: str | None = None


@dataclass(frozen=True)
class Draft:
    """A checked request that still needs a version, whose tokenizer encodes the prompt, and perhaps a seed.

    Prompt tokens stay as the call holds them: there may be millions of them until the version's context limits them.
    """

    selection: Selection
    prompt: str | Sequence[int]
    seed: int | None
    options: GenerationOptions

    def complete(self, version: int, tokenizer: Tokenizer, context_length: int, seed: int) -> GenerationRequest:
        """Returns the request to a version; raises `InvalidArgument` if the prompt does not fit it.

        An empty prompt becomes the end token, with which every document of the training text begins.
        """
        if isinstance(self.prompt, str):
            _check_characters(self.prompt, tokenizer, context_length)
            prompt = tuple(tokenizer.encode(self.prompt))
        else:
            _check_length(len(self.prompt), version, context_length)
            prompt = tuple(self.prompt)
            _check_tokens("prompt_tokens contains", prompt, version, tokenizer)
        biased = [token for token, _ in self.options.sampling.logit_bias]
        _check_tokens("logit_bias contains token", biased, version, tokenizer)
        prompt = prompt or (tokenizer.end_token,)
        _check_length(len(prompt), version, context_length)
        return GenerationRequest(**vars(self.options), version=version, prompt=prompt, seed=seed)


def new_draft(
    *,
    selection: Selection,
    prompt: str | Sequence[int],
    slots: int,
    sampling: SamplingParameters,
    seed: int | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    min_tokens: int = 0,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int = 1,
    remaining_s: float | None = None,
) -> Draft:
    """Checks everything that does not depend on a version; raises `InvalidArgument` that names the value.

    slots: those that the caller may use. remaining_s: until the deadline of the call. The others are as in
    `GenerationOptions`.
    """
    arrived = time.monotonic()
    if max_tokens < 1:
        raise InvalidArgument(f"max_tokens is {max_tokens}, but must be at least 1.")
    if not 0 <= min_tokens <= max_tokens:
        raise InvalidArgument(f"min_tokens is {min_tokens}, but must be from 0 to max_tokens ({max_tokens}).")
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        if value is not None and not 0 <= value <= MAX_LOGPROBS:
            raise InvalidArgument(f"{name} is {value}, but must be from 0 to {MAX_LOGPROBS}.")
    if not 1 <= n <= slots:
        raise InvalidArgument(f"n is {n}, but must be from 1 to {slots}, the samples that you may have at once.")
    _check_stops(stop)
    return Draft(
        selection=selection,
        prompt=prompt,
        seed=seed,
        options=GenerationOptions(
            id=(own_id := uuid.uuid4().hex),
            call_id=str(current_ids().get("request_id", own_id)),
            sampling=sampling,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=tuple(stop),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            samples=n,
            arrived=arrived,
            deadline=None if remaining_s is None else arrived + remaining_s,
        ),
    )


def check_number(version: int, field: str = "version") -> int:
    """Returns the number of a version; raises `InvalidArgument` if it is not positive."""
    if version < 1:
        raise InvalidArgument(f"{field} is {version}, but versions are numbered from 1.")
    return version


def _check_length(tokens: int, version: int, context_length: int) -> None:
    if tokens >= context_length:
        raise InvalidArgument(
            f"The prompt has {tokens} tokens, but must have fewer than {context_length}, the context length of version "
            f"{version}."
        )


def _check_tokens(what: str, tokens: Sequence[int], version: int, tokenizer: Tokenizer) -> None:
    for token in tokens:
        if not 0 <= token < tokenizer.vocabulary_size:
            raise InvalidArgument(
                f"{what} {token}, but version {version} has the tokens 0 to {tokenizer.vocabulary_size - 1}."
            )


def _check_characters(prompt: str, tokenizer: Tokenizer, context_length: int) -> None:
    """Rejects a text that is too long for the context without encoding it."""
    size_bytes, longest = len(prompt.encode()), int(tokenizer.byte_lengths.max())
    fewest = math.ceil(size_bytes / longest)
    if fewest >= context_length:
        raise InvalidArgument(
            f"The prompt of {size_bytes} bytes has at least {fewest} tokens, but must have fewer than "
            f"{context_length}, the context length."
        )


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidArgument(f"stop has {len(stops)} texts, but the limit is {MAX_STOPS}.")
    for stop in stops:
        if not stop:
            raise InvalidArgument("stop contains an empty text, but every text must have at least one character.")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise InvalidArgument(
                f"stop contains a text of {len(stop)} characters, but the limit is {MAX_STOP_CHARACTERS}."
            )
