import os
from pathlib import Path

from shared.service.settings import Directories
from trainer_service.disk import usage


def test_every_file_is_counted_once_with_its_kind(tmp_path: Path) -> None:
    directories = Directories(tmp_path / "var")
    files = {
        "registry/versions/1/model": "versions",
        "registry/runs/run/states/5/model": "states, teachers, histories",
        "registry/runs/run/teachers/1/model": "states, teachers, histories",
        "registry/runs/run/history.jsonl": "states, teachers, histories",
        "registry/evaluations/1/x.json": "evaluations",
        "reports/evaluation-1.html": "reports",
        "registry/serving/policy": "other",
        "registry/staging/x/files/model": "other",
        "registry/last_version": "other",
        "data/shards/x/train.bin": "prepared text",
        "data/stories/animals/ledger.jsonl": "stories",
        "data/judgements/a1b2/ledger.jsonl": "judgements",
        "redis/appendonly.aof": "jobs",
        "log/worker.log": "logs",
        "cache/registry/0123/4567/model": "copies of the registry",
        "cache/trainer/kernels-0/a.so": "compiled",
        "run/command": "other",
        "demo/registry/versions/1/model": "other",
    }
    expected: dict[str, int] = {}
    for size, (name, kind) in enumerate(files.items(), start=1000):
        path = directories.var / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        expected[kind] = expected.get(kind, 0) + size
    # Neither what a link names, nor a circle of links, nor a name that is no text.
    (directories.var / "circle").symlink_to(directories.var)
    (directories.log / "elsewhere").symlink_to("/")
    (directories.log / os.fsdecode(b"\xff")).write_bytes(bytes(7))
    expected["logs"] += 7
    found = {each.kind: each.size_bytes for each in usage(directories)}
    assert found == expected


def test_a_teacher_takes_room_once_its_version_is_gone(tmp_path: Path) -> None:
    directories = Directories(tmp_path)
    model, teacher = (directories.registry / name / "model" for name in ("versions/1", "runs/run/teachers/1"))
    for path in (model, teacher):
        path.parent.mkdir(parents=True)
    model.write_bytes(bytes(5000))
    teacher.hardlink_to(model)

    def sizes() -> list[int]:
        return [each.size_bytes for each in usage(directories)][:2]

    assert sizes() == [5000, 0]
    model.unlink()
    assert sizes() == [0, 5000]


def test_nothing_takes_no_room(tmp_path: Path) -> None:
    assert [each.size_bytes for each in usage(Directories(tmp_path / "var"))] == [0] * 12
    assert not (tmp_path / "var").exists()


def test_holes_are_not_counted(tmp_path: Path) -> None:
    directories = Directories(tmp_path)
    directories.redis.mkdir()
    with (directories.redis / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert {each.kind: each.size_bytes for each in usage(directories)}["jobs"] < 1 << 20
