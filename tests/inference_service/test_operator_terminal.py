"""How the answers to operators are printed."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from inference_service import operator_terminal
from inference_service.operator_terminal import print_versions
from shared.pb.inference.v1 import inference_pb2 as pb


def _four_hours_ago() -> Timestamp:
    return Timestamp(seconds=round(time.time()) - 4 * 3600)


def status(version: int, state: pb.VersionState, **fields: Any) -> pb.VersionStatus:
    """Returns a version that was published 4 hours ago."""
    defaults: dict[str, Any] = {
        "claimed_loss": 3.25,
        "validation_loss": 3.3,
        "bits_per_byte": 1.5,
        "step": 100 * version,
        "created_at": _four_hours_ago(),
        "digest": "0123abcd",
    }
    return pb.VersionStatus(version=version, state=state, **(defaults | fields))


IN_MEMORY = {"memory_bytes": 12 << 20, "weight_format": "fp32"}
# Every kind of cell, as wide as possible.
WIDE = pb.ListVersionsResponse(
    versions=[
        status(
            *(1, pb.VERSION_STATE_SERVING),
            labels=["best", "stable", "pinned:1"],
            streams=12,
            held=True,
            memory_bytes=12 << 30,
            weight_format="int8",
            measured_loss=3.0,
        ),
        status(2, pb.VERSION_STATE_AVAILABLE),
        status(3, pb.VERSION_STATE_RESIDENT, streams=1, measured_loss=10.12344, **IN_MEMORY),
        status(4, pb.VERSION_STATE_RESIDENT, held=True, measured_loss=3.0, **IN_MEMORY),
        status(
            *(1234, pb.VERSION_STATE_REFUSED),
            labels=["latest"],
            reason="loss_mismatch: it claims a held-out loss of 3.2500 nats a token, but has 3.7500 as served in int8",
            measured_loss=3.75,
        ),
    ],
    policy="pinned:1",
    notices=["The policy stays pinned:1: its file cannot be understood."],
)


ROWS = (
    "version     step  state      held-out loss  bits per byte  as served   streams  weights    memory  age  labels",
    "      1      100  serving           3.3000         1.5000    -0.2500  12, held  int8     12.0 GiB  4 h  "
    "best, stable, pinned:1",
    "      2      200  available         3.3000         1.5000                                          4 h",
    "      3      300  resident          3.3000         1.5000    +6.8734         1  fp32       12 MiB  4 h",
    "      4      400  resident          3.3000         1.5000    -0.2500      held  fp32       12 MiB  4 h",
    "   1234  123,400  refused           3.3000         1.5000    +0.5000                               4 h  latest",
)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Returns the lines that an answer has on a terminal, without styles; without `columns`, in a file."""

    def show(answer: pb.ListVersionsResponse, columns: int | None = None) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns or 80))
        monkeypatch.setenv("FORCE_COLOR" if columns else "NO_COLOR", "1")
        for version in answer.versions:
            # The answer was made when the file was imported, which may be an hour ago.
            version.created_at.CopyFrom(_four_hours_ago())
        print_versions(answer)
        output = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        return [line.rstrip() for line in output.splitlines()]

    return show


@pytest.mark.parametrize("columns", [None, 130])
def test_each_version_has_one_row(show: Callable[..., list[str]], columns: int | None) -> None:
    assert show(WIDE, columns) == [
        *ROWS,
        "version 1234: loss_mismatch: it claims a held-out loss of 3.2500 nats a token, but has 3.7500 as served in "
        "int8",
        "The policy stays pinned:1: its file cannot be understood.",
        "policy: pinned:1",
    ]


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal_has_fewer_columns_and_wraps_labels(show: Callable[..., list[str]], columns: int) -> None:
    lines = show(WIDE, columns)
    table = lines[: lines.index(next(line for line in lines if line.startswith("version 1234")))]
    assert max(len(line) for line in table) <= columns
    assert "…" not in "".join(table) and "held-out loss  bits per byte" in table[0]
    assert [line.split()[0] for line in table if line[:7].strip()] == ["version", "1", "2", "3", "4", "1234"]
    assert re.findall(r"(?:best|stable|pinned:1|latest)(?=,|\s|$)", " ".join(table)) == [
        *("best", "stable", "pinned:1", "latest")
    ]


def test_json_includes_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    print_versions(WIDE, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["version"] for row in rows] == [1, 2, 3, 4, 1234]
    assert rows[-1]["reason"].startswith("loss_mismatch") and rows[-1]["state"] == "refused"
    assert (rows[0]["held_out_loss"], rows[0]["measured_loss"], rows[1]["measured_loss"]) == (3.3, 3.0, None)


def test_evaluations_by_the_newest_method_compare_and_others_stand_in_parentheses(
    show: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(bits_per_byte: float, method: str, measured_at: int) -> pb.TextQuality:
        at = Timestamp(seconds=measured_at)
        return pb.TextQuality(method_digest=method, bits_per_byte=bits_per_byte, measured_at=at, tokens=1000)

    answer = pb.ListVersionsResponse(
        versions=[
            status(1, pb.VERSION_STATE_AVAILABLE, evaluation=evaluated(1.6, "aa", 100)),
            status(2, pb.VERSION_STATE_AVAILABLE),
            status(3, pb.VERSION_STATE_SERVING, evaluation=evaluated(1.5, "bb", 200), labels=["best"]),
        ],
        policy="best",
        best_by=pb.BEST_BY_EVALUATION,
    )
    heading, *rows, rule, policy = show(answer)
    place = slice(heading.index("evaluated") - 2, heading.index("evaluated") + len("evaluated"))
    assert [row[place].strip() for row in rows] == ["(1.6000)", "", "1.5000"]
    assert (rule, policy) == ("best by: evaluation", "policy: best")
    print_versions(answer, as_json=True)
    first, second, _ = (row["evaluation"] for row in json.loads(capsys.readouterr().out))
    assert first == {"method_digest": "aa", "bits_per_byte": 1.6, "measured_at": 100, "tokens": 1000}
    assert second is None


def test_an_empty_list_says_when_the_first_version_comes(show: Callable[..., list[str]]) -> None:
    assert show(pb.ListVersionsResponse(policy="latest")) == [
        "No version yet: the first one comes with the first evaluation of a training job.",
        "policy: latest",
    ]


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ([], "The policy is stable. No version serves yet."),
        ([status(1, pb.VERSION_STATE_SERVING, labels=["stable"])], "The policy is stable. Version 1 serves now."),
        ([status(1, pb.VERSION_STATE_SERVING)], "The policy is stable. Version 1 serves now."),
        (
            [status(1, pb.VERSION_STATE_SERVING), status(2, pb.VERSION_STATE_LOADING, labels=["best", "stable"])],
            "The policy is stable. Version 2 (loading) has this label. Version 1 serves now.",
        ),
        (
            [status(2, pb.VERSION_STATE_WAITING, labels=["stable"])],
            "The policy is stable. Version 2 (waiting) has this label. No version serves yet.",
        ),
    ],
)
def test_a_policy_is_described_with_what_serves(versions: list[pb.VersionStatus], sentence: str) -> None:
    assert operator_terminal.describe_policy(pb.ListVersionsResponse(versions=versions, policy="stable")) == sentence


def test_an_unloaded_version_is_described_with_its_running_streams() -> None:
    leaving = status(3, pb.VERSION_STATE_RESIDENT, streams=2)
    assert operator_terminal.describe_unloaded(leaving) == (
        "Version 3 leaves memory when its last stream ends; 2 of them run now."
    )


def test_a_rollback_is_described_with_the_state_of_the_new_version() -> None:
    assert operator_terminal.describe_rollback(status(3, pb.VERSION_STATE_LOADING)) == (
        "Version 3 (loading) serves as soon as it is in memory."
    )
    assert operator_terminal.describe_rollback(status(3, pb.VERSION_STATE_SERVING)) == "Version 3 serves now."
