"""What operators see of versions."""

import time

from rich.table import Table

from shared import cli
from shared.pb.inference.v1 import inference_pb2 as pb


def print_versions(answer: pb.ListVersionsResponse) -> None:
    """A table of all versions, why some do not serve, and the policy; a row is one line of 80 columns."""
    if not answer.versions:
        print("No version yet: the first one comes with the first evaluation of a training job.")
    else:
        cli.print_table(_table(answer))
    for status in answer.versions:
        if status.reason:
            print(f"version {status.version}: {status.reason}")
    print(f"policy: {answer.policy}")


def describe(status: pb.VersionStatus) -> str:
    """A version with its state, in a few words."""
    return f"Version {status.version} ({_state(status)})"


def describe_loaded(status: pb.VersionStatus) -> str:
    """What a version in memory takes there, and how good it is."""
    return f"{describe(status)} is in memory: {_memory(status)}, held-out loss {_loss(status)}."


def describe_unloaded(status: pb.VersionStatus) -> str:
    """When an unloaded version is gone from memory."""
    if not status.streams:
        return f"Version {status.version} has left memory."
    return f"Version {status.version} leaves memory when its last stream ends; {status.streams} of them run now."


def describe_rollback(status: pb.VersionStatus) -> str:
    """When the version after a rollback serves, or that it does."""
    if status.state == pb.VERSION_STATE_SERVING:
        return f"Version {status.version} serves now."
    return f"{describe(status)} serves as soon as it is in memory."


def describe_policy(answer: pb.ListVersionsResponse) -> str:
    """The policy, the version that it names, and the one that serves now."""
    serving = next((one.version for one in answer.versions if one.state == pb.VERSION_STATE_SERVING), None)
    named = next((one for one in answer.versions if answer.policy in one.labels), None)
    sentences = f"The policy is {answer.policy}. "
    if named is not None and named.version != serving:
        sentences += f"{describe(named)} has this label. "
    return sentences + ("No version serves yet." if serving is None else f"Version {serving} serves now.")


def _table(answer: pb.ListVersionsResponse) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("version", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    # The only one that gives way on a narrow terminal.
    table.add_column("labels")
    for name in ("streams", "memory", "loss", "bits/byte", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for status in answer.versions:
        table.add_row(
            str(status.version),
            _state(status),
            ", ".join(status.labels),
            _use(status),
            _memory(status),
            *_description(status),
        )
    return table


def _state(status: pb.VersionStatus) -> str:
    return pb.VersionState.Name(status.state).removeprefix("VERSION_STATE_").lower()


def _use(status: pb.VersionStatus) -> str:
    """What keeps a version in memory, apart from that it serves."""
    held = "held" if status.held else ""
    return ", ".join(filter(None, (str(status.streams or ""), held)))


def _memory(status: pb.VersionStatus) -> str:
    return f"{status.memory_bytes / 2**20:.0f} MiB" if status.memory_bytes else ""


def _description(status: pb.VersionStatus) -> tuple[str, str, str]:
    """Loss, bits per byte and age; nothing where the manifest cannot be read."""
    if not status.digest:
        return ("", "", "")
    age = cli.duration(time.time() - status.created_at.ToSeconds())
    return (_loss(status).center(8), f"{status.bits_per_byte:.4f}", age)


def _loss(status: pb.VersionStatus) -> str:
    """As this server measured it, else as training claims, in parentheses."""
    if status.HasField("measured_loss"):
        return f"{status.measured_loss:.4f}"
    return f"({status.claimed_loss:.4f})"
