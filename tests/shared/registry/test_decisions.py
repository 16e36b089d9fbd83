import errno
import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import CorruptCheckpoint, FailedPrecondition, InvalidArgument, shown
from shared.registry.decisions import (
    LABELS,
    Decisions,
    check_label,
    pinned,
    pinned_number,
)
from shared.registry.findings import Finding
from tests.registries import disk_registry

FINDING = Finding("digest", "cpu", loss=2.5, refusal=None, sentence="", at=1.0)
REFUSAL = replace(FINDING, loss=None, refusal="lying", sentence="It claims too much.")

# The method that writes each file.
WRITES: dict[str, Callable[[Decisions], None]] = {
    "policy": lambda decisions: decisions.set_policy("latest"),
    "stable": lambda decisions: decisions.set_stable(7),
    "findings/7.cpu.json": lambda decisions: decisions.keep(7, FINDING),
}

INVALID_NUMBERS = (
    "",
    "0",
    "007",
    "9" * 5000,
    "00",
    "-1",
    "+1",
    "x",
    "7.0",
    "1_0",
    " 7",
    "7\n",
    "٣",
    "²",
    "pinned:7",
    "stable",
)

DAMAGED_FINDINGS = (
    *("", "{", "[]", "7", "null", '"text"', "{}", b"\xff"),
    json.dumps(asdict(REFUSAL))[:-1],
    json.dumps({name: value for name, value in asdict(REFUSAL).items() if name != "refusal"}),
    json.dumps(asdict(REFUSAL) | {"loss": "x"}),
    json.dumps(asdict(REFUSAL) | {"refusal": False}),
    "[" * 100_000,
)


@pytest.fixture
def decisions(tmp_path: Path) -> Decisions:
    return disk_registry(tmp_path / "registry").decisions


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    return tmp_path / "registry" / "serving"


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_without_any_decision_best_serves(
    decisions: Decisions, serving: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decisions.policy() == "best"
    assert decisions.stable() is None
    assert decisions.findings() == {}
    assert not caplog.text
    assert not serving.parent.exists(), "reading created a folder"


# Labels


@pytest.mark.parametrize("label", [*LABELS, "pinned:7", "run:demo-20260101-000000-ab12", "run:größer"])
def test_a_policy_is_read_as_it_was_set(decisions: Decisions, serving: Path, label: str) -> None:
    for each in ("pinned:1", label):
        decisions.set_policy(each)
    assert decisions.policy() == disk_registry(serving.parent).decisions.policy() == label


@pytest.mark.parametrize(
    "label",
    [
        *("", "newest", "Best", " best", "best\n", "7", "stable:7", "pinned", "run", "run:", "run:a/b", "run:.."),
        *("run:a\n", f"run:{'x' * 300}", *(f"pinned:{rest}" for rest in INVALID_NUMBERS)),
    ],
)
def test_an_invalid_label_is_rejected_by_name(decisions: Decisions, label: str) -> None:
    sentence = f"{shown(label)} is not a label; the labels are best, latest, stable, run:<name> and pinned:<version>."
    decisions.set_policy("latest")
    with pytest.raises(InvalidArgument, match=re.escape(sentence)):
        check_label(label)
    with pytest.raises(InvalidArgument, match=re.escape(sentence)):
        decisions.set_policy(label)
    assert decisions.policy() == "latest"


@given(st.integers(1, 10**18 - 1))
def test_a_pinned_label_contains_its_number(number: int) -> None:
    assert check_label(pinned(number)) == pinned(number)
    assert pinned_number(pinned(number)) == number


@pytest.mark.parametrize("label", LABELS)
def test_only_pinned_labels_contain_a_number(label: str) -> None:
    assert pinned_number(label) is None


@pytest.mark.parametrize("content", ["newest", "pinned:0", "pinned:x", "best latest", "\0\0\0\0", b"\xff\xfe"])
def test_a_damaged_policy_is_an_error_until_another_one_is_set(
    decisions: Decisions, serving: Path, content: str | bytes
) -> None:
    write(serving / "policy", content)
    with pytest.raises(CorruptCheckpoint, match=rf"{re.escape(str(serving))}/policy cannot be"):
        decisions.policy()
    decisions.set_policy("latest")
    assert decisions.policy() == "latest"


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_policy_means_best(decisions: Decisions, serving: Path, content: str | bytes) -> None:
    write(serving / "policy", content)
    assert decisions.policy() == "best"


def test_a_decision_may_be_written_with_an_editor(decisions: Decisions, serving: Path) -> None:
    write(serving / "policy", "pinned:7\n")
    write(serving / "stable", "6\n")
    assert (decisions.policy(), decisions.stable()) == ("pinned:7", 6)


# The stable version


def test_the_last_promoted_version_is_stable(decisions: Decisions, serving: Path) -> None:
    for number in (10, 7):
        decisions.set_stable(number)
    assert decisions.stable() == disk_registry(serving.parent).decisions.stable() == 7


@pytest.mark.parametrize("content", ["", "x", "-1", "0", "07", "7.0", "1_0", "٣", "²", "\0", b"\xff", "9" * 5000])
def test_a_damaged_stable_version_is_an_error_until_another_one_is_promoted(
    decisions: Decisions, serving: Path, content: str | bytes
) -> None:
    write(serving / "stable", content)
    with pytest.raises(CorruptCheckpoint, match=rf"{re.escape(str(serving))}/stable cannot be"):
        decisions.stable()
    decisions.set_stable(7)
    assert decisions.stable() == 7


def test_an_unreadable_decision_does_not_count_as_undecided(decisions: Decisions, serving: Path) -> None:
    serving.mkdir(parents=True)
    for name in ("policy", "stable"):
        (serving / name).symlink_to(serving / name)
    for read in (decisions.policy, decisions.stable):
        with pytest.raises(CorruptCheckpoint, match="cannot be read"):
            read()


# Findings


@given(
    st.builds(
        Finding,
        digest=st.text(),
        device=st.from_regex("[a-z0-9_]+", fullmatch=True),
        loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        refusal=st.none() | st.text(),
        sentence=st.text(),
        at=st.floats(allow_nan=False, allow_infinity=False),
        stands_on=st.none() | st.text(),
    )
)
def test_a_finding_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, finding: Finding) -> None:
    root = tmp_path_factory.mktemp("registry")
    disk_registry(root).decisions.keep(7, finding)
    assert disk_registry(root).decisions.findings() == {7: [finding]}


def test_an_older_finding_does_not_replace_a_newer_one_about_the_same_content(decisions: Decisions) -> None:
    newer = replace(REFUSAL, at=2.0)
    for finding in (newer, FINDING):
        decisions.keep(2, finding)
    assert decisions.findings() == {2: [newer]}
    another = replace(FINDING, digest="another digest")
    decisions.keep(2, another)
    assert decisions.findings() == {2: [another]}


def test_the_last_finding_of_each_version_and_device_is_kept(decisions: Decisions) -> None:
    elsewhere = replace(FINDING, device="metal")
    for finding in (FINDING, elsewhere, REFUSAL):
        decisions.keep(2, finding)
    decisions.keep(12, FINDING)
    findings = decisions.findings()
    assert {number: sorted(each, key=lambda one: one.device) for number, each in findings.items()} == {
        2: [REFUSAL, elsewhere],
        12: [FINDING],
    }


def test_a_finding_of_an_older_program_stands_on_nothing(decisions: Decisions, serving: Path) -> None:
    values = {name: value for name, value in asdict(REFUSAL).items() if name != "stands_on"}
    write(serving / "findings" / "7.cpu.json", json.dumps(values))
    assert decisions.findings() == {7: [REFUSAL]}


def test_a_rollback_is_written_completely_or_not_at_all(
    decisions: Decisions, serving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions.set_policy("latest")
    synced: list[int] = []

    def fail_second(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            synced.append(descriptor)
            if len(synced) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(FailedPrecondition, match="free space"):
        decisions.roll_back(7, REFUSAL, "pinned:6")
    assert len(synced) == 2
    assert (decisions.policy(), decisions.findings()) == ("latest", {})
    assert not list(serving.rglob("*.new"))
    monkeypatch.undo()
    decisions.roll_back(7, REFUSAL, "pinned:6")
    assert (decisions.policy(), decisions.findings()) == ("pinned:6", {7: [REFUSAL]})


@pytest.mark.parametrize("content", DAMAGED_FINDINGS)
def test_an_unreadable_finding_is_ignored(decisions: Decisions, serving: Path, content: str | bytes) -> None:
    decisions.keep(1, FINDING)
    write(serving / "findings" / "2.cpu.json", content)
    assert decisions.findings() == {1: [FINDING]}
    decisions.keep(2, REFUSAL)
    assert decisions.findings() == {1: [FINDING], 2: [REFUSAL]}


def test_forgotten_findings_are_gone(decisions: Decisions) -> None:
    for number in (1, 2):
        decisions.keep(number, REFUSAL)
    decisions.keep(1, replace(REFUSAL, device="metal"))
    decisions.forget(1)
    decisions.forget(1)
    assert decisions.findings() == {2: [REFUSAL]}


def test_forgetting_without_findings_does_nothing(decisions: Decisions, serving: Path) -> None:
    decisions.forget(1)
    assert not serving.parent.exists()


# The disk


@pytest.mark.parametrize("name", WRITES)
def test_a_file_in_the_place_of_the_folder_is_an_error(decisions: Decisions, serving: Path, name: str) -> None:
    write(serving, "in the way")
    write_it = WRITES[name]
    with pytest.raises(FailedPrecondition, match=rf"{re.escape(str(serving))}.*\); remove the file"):
        write_it(decisions)
    assert serving.read_text() == "in the way"
    assert (decisions.policy(), decisions.stable(), decisions.findings()) == ("best", None, {})


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable")])
def test_a_failed_write_leaves_the_old_text(
    decisions: Decisions,
    serving: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    advice: str,
) -> None:
    def fail(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    decisions.set_policy("pinned:3")
    decisions.set_stable(3)
    decisions.keep(7, REFUSAL)
    old = {path: path.read_bytes() for path in serving.rglob("*") if path.is_file()}
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", fail)
    expected = f"{re.escape(str(serving.parent))} cannot be written: {os.strerror(number)}; .*{advice}"
    with pytest.raises(FailedPrecondition, match=expected):
        WRITES[name](decisions)
    assert {path: path.read_bytes() for path in serving.rglob("*") if path.is_file()} == old
    monkeypatch.undo()
    WRITES[name](decisions)
    assert (serving / name).read_bytes() != old[serving / name]


def test_a_reader_sees_one_complete_text_of_concurrent_writers(decisions: Decisions, serving: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        from tests.registries import disk_registry
        from shared.registry.findings import Finding

        decisions = disk_registry(Path(sys.argv[1])).decisions
        finding = Finding("digest", "cpu", None, "lying", sys.argv[2] * 100_000, 1.0)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda _: decisions.keep(7, finding), range(40)))
        """
    )
    kept = [replace(REFUSAL, sentence=letter * 100_000) for letter in "ab"]
    decisions.keep(7, kept[0])
    command = [sys.executable, "-c", program, str(serving.parent)]
    writers = [subprocess.Popen([*command, letter], cwd=Path(__file__).parents[3]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert decisions.findings()[7][0] in kept
    assert [writer.returncode for writer in writers] == [0, 0]
    assert decisions.findings()[7][0] in kept
    assert [path.name for path in (serving / "findings").iterdir()] == ["7.cpu.json"]
