"""Translates protobuf messages into frozen values and back. Nothing behind this module sees a message."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields

from google.protobuf.timestamp_pb2 import Timestamp

from inference_service.engine.request import Delta, Finished, GenerationOptions, GenerationRequest
from inference_service.versions.status import VersionStatus
from shared.decoding.sampling import SamplingParameters, check_biases
from shared.errors import InvalidArgument
from shared.gpt.tokenizer import Tokenizer
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.registry.evaluations import Figures
from shared.registry.manifest import VersionManifest
from shared.text import shorten, valid_unicode

DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
# The longest text of the registry that a message carries.
_MOST_CHARACTERS = 1000


@dataclass(frozen=True)
class Selection:
    """The version that a call selects: a number, a label, or the serving one if both are None."""

    version: int | None = None
    label: str | None = None


@dataclass(frozen=True)
class Draft:
    """A checked `GenerateRequest` that still needs a version, whose tokenizer encodes the prompt, and perhaps a seed.

    Prompt tokens stay as the message holds them: there may be millions of them until the version's context limits them.
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


def draft_from_pb(message: pb.GenerateRequest, remaining_s: float | None, slots: int) -> Draft:
    """Checks all that does not depend on a version; raises `InvalidArgument` that names the field."""
    arrived = time.monotonic()
    max_tokens = message.max_tokens if message.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if max_tokens < 1:
        raise InvalidArgument(f"max_tokens is {max_tokens}, but must be at least 1.")
    if not 0 <= message.min_tokens <= max_tokens:
        raise InvalidArgument(f"min_tokens is {message.min_tokens}, but must be from 0 to max_tokens ({max_tokens}).")
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise InvalidArgument(f"logprobs is {logprobs}, but must be from 0 to {MAX_LOGPROBS}.")
    samples = message.n if message.HasField("n") else 1
    if not 1 <= samples <= slots:
        raise InvalidArgument(f"n is {samples}, but must be from 1 to {slots}, the slots of this server.")
    return Draft(
        selection=selection_from_pb(message.model),
        prompt=_prompt_from_pb(message),
        seed=message.sampling.seed if message.sampling.HasField("seed") else None,
        options=GenerationOptions(
            id=uuid.uuid4().hex,
            sampling=_sampling_from_pb(message.sampling),
            max_tokens=max_tokens,
            min_tokens=message.min_tokens,
            stop=_stops_from_pb(message.stop),
            ignore_eos=message.ignore_eos,
            logprobs=logprobs,
            samples=samples,
            arrived=arrived,
            deadline=None if remaining_s is None else arrived + remaining_s,
        ),
    )


def selection_from_pb(message: pb.ModelSelector) -> Selection:
    """Reads a selector; raises `InvalidArgument` if its version number is not positive."""
    match message.WhichOneof("choice"):
        case "version":
            return Selection(version=number_from_pb(message.version, "model.version"))
        case "label":
            return Selection(label=message.label)
        case _:
            return Selection()


def number_from_pb(version: int, field: str = "version") -> int:
    """Returns the version number; raises `InvalidArgument` if it is not positive."""
    if version < 1:
        raise InvalidArgument(f"{field} is {version}, but versions are numbered from 1.")
    return version


def started_to_pb(request: GenerationRequest, digest: str) -> pb.GenerateResponse:
    """Returns the first message of a stream; `digest` is the digest of its version."""
    started = pb.Started(
        request_id=request.id,
        model_version=request.version,
        seed=request.seed,
        prompt_tokens=len(request.prompt),
        model_digest=digest,
    )
    return pb.GenerateResponse(started=started)


def delta_to_pb(delta: Delta, index: int) -> pb.GenerateResponse:
    """Returns the message for a delta of a sample."""
    logprobs = [
        pb.TokenLogprobs(
            logprob=draw.logprob,
            rank=draw.rank or 0,
            alternatives=[pb.TokenLogprob(token_id=other.token, logprob=other.logprob) for other in draw.alternatives],
        )
        for draw in delta.draws
        if draw.logprob is not None
    ]
    token_ids = [draw.token for draw in delta.draws]
    return pb.GenerateResponse(delta=pb.Delta(text=delta.text, token_ids=token_ids, logprobs=logprobs, index=index))


def finished_to_pb(finished: Finished, index: int) -> pb.GenerateResponse:
    """Returns the last message of a sample."""
    message = pb.Finished(
        reason=f"FINISH_REASON_{finished.reason.name}",
        matched_stop=finished.matched_stop or "",
        prompt_tokens=finished.prompt_tokens,
        generated_tokens=finished.generated_tokens,
        queue_seconds=finished.total_s if finished.queue_s is None else finished.queue_s,
        time_to_first_token_seconds=finished.first_token_s or 0.0,
        total_seconds=finished.total_s,
        index=index,
        cached_prompt_tokens=finished.cached_prompt_tokens,
    )
    return pb.GenerateResponse(finished=message)


def readable(text: str) -> str:
    """Returns a text of the registry as a message can carry it: valid UTF-8 and not too long."""
    return valid_unicode(shorten(text, _MOST_CHARACTERS))


def model_to_pb(manifest: VersionManifest, labels: Sequence[str], evaluation: Figures | None) -> pb.GetModelResponse:
    """Describes a version by its manifest, and by its evaluation if there is one."""
    config = {
        name: value
        for name, value in manifest.model.items()
        if name in pb.ModelConfig.DESCRIPTOR.fields_by_name
        and isinstance(value, bool if name == "tied_head" else int)
        and abs(value) < 2**31
    }
    return pb.GetModelResponse(
        version=manifest.version,
        run=readable(manifest.run),
        step=manifest.step,
        created_at=_time_to_pb(manifest.created_at),
        config=pb.ModelConfig(**config),  # type: ignore[arg-type]
        tokenizer=readable(manifest.tokenizer),
        parameters=manifest.parameters,
        training_loss=manifest.training_loss,
        validation_loss=manifest.validation_loss,
        bits_per_byte=manifest.bits_per_byte,
        labels=labels,
        evaluation=_quality_to_pb(evaluation),
    )


def status_to_pb(status: VersionStatus) -> pb.VersionStatus:
    """Describes the status of a version on this server."""
    message = pb.VersionStatus(
        version=status.number,
        state=f"VERSION_STATE_{status.state.name}",
        reason=readable(status.reason),
        labels=status.labels,
        streams=status.streams,
        held=status.held,
        memory_bytes=status.memory_bytes,
        measured_loss=status.loss,
        evaluation=_quality_to_pb(status.evaluation),
    )
    if (manifest := status.manifest) is not None:
        described = pb.VersionStatus(
            claimed_loss=manifest.claimed_loss,
            validation_loss=manifest.validation_loss,
            bits_per_byte=manifest.bits_per_byte,
            step=manifest.step,
            created_at=_time_to_pb(manifest.created_at),
            digest=manifest.digest,
        )
        message.MergeFrom(described)
    return message


def _quality_to_pb(figures: Figures | None) -> pb.TextQuality | None:
    if figures is None:
        return None
    return pb.TextQuality(
        method_digest=figures.method_digest,
        measured_at=_time_to_pb(figures.measured_at),
        tokens=figures.tokens,
        nats_per_token=figures.nats_per_token,
        nats_per_token_low=figures.low,
        nats_per_token_high=figures.high,
        perplexity=figures.perplexity,
        bits_per_byte=figures.bits_per_byte,
    )


def _time_to_pb(seconds: float) -> Timestamp:
    """Converts a time of `time.time`."""
    written = Timestamp()
    written.FromMilliseconds(round(seconds * 1000))
    return written


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


def _prompt_from_pb(message: pb.GenerateRequest) -> str | Sequence[int]:
    match message.WhichOneof("input"):
        case "prompt":
            return message.prompt
        case "prompt_tokens":
            return message.prompt_tokens.ids
        case _:
            raise InvalidArgument(
                "The request has neither prompt nor prompt_tokens; to start from nothing, send an empty prompt."
            )


def _sampling_from_pb(message: pb.Sampling) -> SamplingParameters:
    check_biases(len(message.logit_bias))
    names = {field.name for field in fields(SamplingParameters)} - {"logit_bias"}
    given = {name: getattr(message, name) for name in names if message.HasField(name)}
    return SamplingParameters(**given, logit_bias=tuple(sorted(message.logit_bias.items())))


def _stops_from_pb(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidArgument(f"stop has {len(stops)} texts, but the limit is {MAX_STOPS}.")
    for stop in stops:
        if not stop:
            raise InvalidArgument("stop contains an empty text, but every text must have at least one character.")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise InvalidArgument(
                f"stop contains a text of {len(stop)} characters, but the limit is {MAX_STOP_CHARACTERS}."
            )
    return tuple(stops)
