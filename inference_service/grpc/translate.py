"""Translates protobuf messages into frozen values and back. Nothing behind this module sees a message."""

from collections.abc import Sequence
from dataclasses import fields

from google.protobuf.timestamp_pb2 import Timestamp

from inference_service.draft import Draft, Selection, check_number, new_draft
from inference_service.engine.request import Delta, Draw, Finished, GenerationRequest, PromptRead
from inference_service.versions.resident import Resident
from inference_service.versions.status import VersionStatus
from shared.decoding.sampling import SamplingParameters, check_biases
from shared.errors import InvalidArgument
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.registry.evaluations import Figures
from shared.registry.manifest import VersionManifest
from shared.text import shorten, valid_unicode

# The longest text of the registry that a message carries.
_MOST_CHARACTERS = 1000


def draft_from_pb(message: pb.GenerateRequest, remaining_s: float | None, slots: int) -> Draft:
    """Checks all that does not depend on a version; raises `InvalidArgument` that names the field."""
    names = ("max_tokens", "logprobs", "prompt_logprobs", "n")
    given = {name: getattr(message, name) for name in names if message.HasField(name)}
    return new_draft(
        selection=selection_from_pb(message.model),
        prompt=_prompt_from_pb(message),
        slots=slots,
        sampling=_sampling_from_pb(message.sampling),
        seed=message.sampling.seed if message.sampling.HasField("seed") else None,
        min_tokens=message.min_tokens,
        stop=message.stop,
        ignore_eos=message.ignore_eos,
        remaining_s=remaining_s,
        **given,
    )


def selection_from_pb(message: pb.ModelSelector) -> Selection:
    """Reads a selector; raises `InvalidArgument` if its version number is not positive."""
    match message.WhichOneof("choice"):
        case "version":
            return Selection(version=check_number(message.version, "model.version"))
        case "label":
            return Selection(label=message.label)
        case _:
            return Selection()


def started_to_pb(request: GenerationRequest, resident: Resident) -> pb.GenerateResponse:
    """Returns the first message of a stream, which a version answers."""
    started = pb.Started(
        request_id=request.call_id,
        model_version=request.version,
        seed=request.seed,
        prompt_tokens=len(request.prompt),
        model_digest=resident.manifest.digest,
        weight_format=resident.weights,
    )
    return pb.GenerateResponse(started=started)


def delta_to_pb(delta: Delta, index: int) -> pb.GenerateResponse:
    """Returns the message for a delta of a sample."""
    logprobs = [_logprobs_to_pb(draw) for draw in delta.draws if draw.logprob is not None]
    token_ids = [draw.token for draw in delta.draws]
    return pb.GenerateResponse(delta=pb.Delta(text=delta.text, token_ids=token_ids, logprobs=logprobs, index=index))


def prompt_to_pb(read: PromptRead) -> pb.GenerateResponse:
    """Returns the message for a part of a prompt."""
    return pb.GenerateResponse(
        prompt=pb.PromptRead(
            token_ids=[token.token for token in read.tokens],
            logprobs=[pb.TokenLogprobs() if each.logprob is None else _logprobs_to_pb(each) for each in read.tokens],
        )
    )


def _logprobs_to_pb(draw: Draw) -> pb.TokenLogprobs:
    assert draw.logprob is not None
    return pb.TokenLogprobs(
        logprob=draw.logprob,
        rank=draw.rank or 0,
        alternatives=[pb.TokenLogprob(token_id=other.token, logprob=other.logprob) for other in draw.alternatives],
    )


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
        weight_format=status.weights or "",
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
