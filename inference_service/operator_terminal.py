"""Shows versions to operators."""

import time
from collections.abc import Callable, Sequence

from shared.pb.inference.v1 import inference_pb2 as pb
from shared.service.lists import Column, print_list
from shared.text import format_duration, format_size, printable


def print_versions(answer: pb.ListVersionsResponse, as_json: bool = False) -> None:
    """Prints the versions, the reasons of those that do not serve, and the policy; JSON has the reasons in the list."""
    print_list(
        answer.versions,
        _columns(answer.versions),
        as_json=as_json,
        empty="No version yet: the first one comes with the first evaluation of a training job.",
    )
    if as_json:
        return
    for status in answer.versions:
        if status.reason:
            print(printable(f"version {status.version}: {status.reason}"))
    for notice in answer.notices:
        print(printable(notice))
    if answer.best_by:  # a server of an older release does not say
        print(f"best by: {pb.BestBy.Name(answer.best_by).removeprefix('BEST_BY_').lower()}")
    print(f"policy: {answer.policy}")


def describe(status: pb.VersionStatus) -> str:
    """Names a version and its state."""
    return f"Version {status.version} ({_state(status)})"


def describe_loaded(status: pb.VersionStatus) -> str:
    """Describes a loaded version: its memory and its loss."""
    return f"{describe(status)} is in memory: {_memory(status)}, held-out loss {status.validation_loss:.4f}."


def describe_unloaded(status: pb.VersionStatus) -> str:
    """Says when an unloaded version leaves memory."""
    if not status.streams:
        return f"Version {status.version} has left memory."
    return f"Version {status.version} leaves memory when its last stream ends; {status.streams} of them run now."


def describe_rollback(status: pb.VersionStatus) -> str:
    """Says whether the next version serves after a rollback, or when it will."""
    if status.state == pb.VERSION_STATE_SERVING:
        return f"Version {status.version} serves now."
    return f"{describe(status)} serves as soon as it is in memory."


def describe_policy(answer: pb.ListVersionsResponse) -> str:
    """Names the policy, the version that it selects, and the one that serves now."""
    serving = next((one.version for one in answer.versions if one.state == pb.VERSION_STATE_SERVING), None)
    named = next((one for one in answer.versions if answer.policy in one.labels), None)
    sentences = f"The policy is {answer.policy}. "
    if named is not None and named.version != serving:
        sentences += f"{describe(named)} has this label. "
    return sentences + ("No version serves yet." if serving is None else f"Version {serving} serves now.")


def _state(status: pb.VersionStatus) -> str:
    return pb.VersionState.Name(status.state).removeprefix("VERSION_STATE_").lower()


def _use(status: pb.VersionStatus) -> str:
    """Says what else than serving keeps a version in memory: its streams, or load."""
    held = "held" if status.held else ""
    return ", ".join(filter(None, (str(status.streams or ""), held)))


def _memory(status: pb.VersionStatus) -> str:
    return format_size(status.memory_bytes) if status.memory_bytes else ""


def _measured(status: pb.VersionStatus) -> float | None:
    return status.measured_loss if status.HasField("measured_loss") else None


def _served(status: pb.VersionStatus) -> str:
    """Returns the difference between the loss that this server measured and that of training on the same windows."""
    measured = _measured(status)
    return "" if measured is None else f"{round(measured - status.claimed_loss, 4) + 0.0:+.4f}"


def _if_known(text: Callable[[pb.VersionStatus], str]) -> Callable[[pb.VersionStatus], str]:
    """Makes a text empty if the manifest cannot be read."""
    return lambda status: text(status) if status.digest else ""


def _evaluation(status: pb.VersionStatus) -> dict[str, object] | None:
    if not status.HasField("evaluation"):
        return None
    figures = {field.name: value for field, value in status.evaluation.ListFields()}
    return figures | {"measured_at": status.evaluation.measured_at.ToSeconds()}


def _evaluated(status: pb.VersionStatus, method: str) -> str:
    """Returns the bits per byte of an evaluation, in parentheses if it used another method than this one."""
    if not status.HasField("evaluation"):
        return ""
    bits_per_byte = f"{status.evaluation.bits_per_byte:.4f}"
    return bits_per_byte if status.evaluation.method_digest == method else f"({bits_per_byte})"


def _columns(statuses: Sequence[pb.VersionStatus]) -> Sequence[Column[pb.VersionStatus]]:
    """Returns the columns of a list; losses and bits per byte are the values that the trainer lists under the same
    names."""
    evaluations = [status.evaluation for status in statuses if status.HasField("evaluation")]
    newest = max(
        evaluations, key=lambda each: each.measured_at.ToMilliseconds(), default=pb.TextQuality()
    ).method_digest
    return (
        Column("version", lambda status: status.version, right=True),
        Column("step", lambda status: status.step, _if_known(lambda status: f"{status.step:,}"), right=True, rank=3),
        Column("state", _state),
        Column(
            "held-out loss",
            lambda status: status.validation_loss,
            _if_known(lambda status: f"{status.validation_loss:.4f}"),
            right=True,
        ),
        Column(
            "bits per byte",
            lambda status: status.bits_per_byte,
            _if_known(lambda status: f"{status.bits_per_byte:.4f}"),
            right=True,
        ),
        Column(
            "evaluated" if any(status.HasField("evaluation") for status in statuses) else "",
            _evaluation,
            lambda status: _evaluated(status, newest),
            key="evaluation",
            right=True,
            rank=2,
        ),
        Column("as served", _measured, _served, right=True, rank=1, key="measured_loss"),
        Column("streams", lambda status: status.streams, _use, right=True, rank=4),
        Column("weights", lambda status: status.weight_format, key="weight_format", rank=6),
        Column("memory", lambda status: status.memory_bytes, _memory, key="memory_bytes", right=True, rank=5),
        Column(
            "age",
            lambda status: status.created_at.ToSeconds(),
            _if_known(lambda status: format_duration(time.time() - status.created_at.ToSeconds())),
            key="created_at",
            right=True,
            rank=2,
        ),
        Column("labels", lambda status: list(status.labels), wraps=True),
        Column("", lambda status: status.claimed_loss, key="claimed_loss"),
        Column("", lambda status: status.held, key="held"),
        Column("", lambda status: status.reason, key="reason"),
    )
