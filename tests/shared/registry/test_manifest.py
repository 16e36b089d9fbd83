"""Manifests: their digests, and invalid values."""

import hashlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import CorruptCheckpoint
from shared.registry.manifest import FileRecord, TeacherRecord, VersionManifest
from shared.registry.registry import Registry
from tests.registries import disk_registry, root_of, version_folder
from tests.shared.registry.scenarios import make_manifest, publish


def _rewrite(directory: Path, **values: object) -> None:
    """Changes values of a manifest and updates its digest, as another program would."""
    path = directory / "manifest.json"
    changed = json.loads(path.read_text()) | values
    del changed["sha256"]
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(changed | {"sha256": digest}))


def test_a_manifest_of_a_newer_program_can_be_read(registry: Registry) -> None:
    publish(registry)
    _rewrite(version_folder(registry, 1), added_later=1)
    assert disk_registry(root_of(registry)).version(1).version == 1


def test_the_digest_is_the_same_in_memory_in_the_file_and_after_reading(registry: Registry) -> None:
    # JSON contains the float as a whole number, and the tuple as a list.
    manifest = publish(registry, claimed_loss=2, training={"rate": 1e-4, "text": "ü"}, validation_files=("a", "b"))
    file = version_folder(registry, 1) / "manifest.json"
    assert manifest.digest == json.loads(file.read_text())["sha256"]
    assert disk_registry(root_of(registry)).version(1).digest == manifest.digest
    assert len(manifest.digest) == 64


def test_a_manifest_without_the_field_for_notes_has_no_notes_and_the_same_digest() -> None:
    text = make_manifest(1).to_json()
    assert "notes" not in json.loads(text)
    read = VersionManifest.from_json(text)
    assert read.notes == "" and read.digest == json.loads(text)["sha256"]
    noted = replace(make_manifest(1), notes="twice the width")
    assert VersionManifest.from_json(noted.to_json()) == noted


def test_a_manifest_without_teachers_has_the_digest_of_before() -> None:
    text = make_manifest(1).to_json()
    assert "teachers" not in json.loads(text) and VersionManifest.from_json(text).teachers == ()
    taught = replace(make_manifest(9), teachers=(TeacherRecord(3, "d"), TeacherRecord(1, "e")))
    assert VersionManifest.from_json(taught.to_json()) == taught
    assert len({make_manifest(9).digest, taught.digest, replace(taught, teachers=taught.teachers[::-1]).digest}) == 3


@pytest.mark.parametrize("teachers", [7, ["7"], [{"version": 7}], [{"version": "7", "digest": "d"}]])
def test_a_teacher_that_is_none_makes_a_manifest_unreadable(registry: Registry, teachers: object) -> None:
    publish(registry)
    _rewrite(version_folder(registry, 1), teachers=teachers)
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json cannot be understood"):
        disk_registry(root_of(registry)).version(1)


def _another(value: Any) -> Any:
    match value:
        case None:
            return 1
        case str():
            return f"{value}x"
        case int() | float():
            return value * 2
        case tuple():
            return (*value, value)
        case _:
            return value | {"another": 1}


def test_every_value_changes_the_digest() -> None:
    record = FileRecord("model.safetensors", size_bytes=7, sha256="abc")
    manifest = make_manifest(1, (record,))
    names = [field.name for field in fields(manifest) if field.name != "files"]
    others = [replace(manifest, **{name: _another(getattr(manifest, name))}) for name in names]
    records = [replace(record, **{field.name: _another(getattr(record, field.name))}) for field in fields(record)]
    others += [replace(manifest, files=files) for files in ((), (record, record), *((each,) for each in records))]
    assert make_manifest(1, (record,)).digest == manifest.digest
    assert len({each.digest for each in (manifest, *others)}) == 1 + len(others)


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_manifest_is_always_detected(place: int, bit: int) -> None:
    text = bytearray(make_manifest(1).to_json().encode())
    text[place % len(text)] ^= 1 << bit
    try:
        read = VersionManifest.from_json(text.decode())
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    # The bit was in the name of the digest itself.
    assert read == make_manifest(1)


@pytest.mark.parametrize("values", [{"bits_per_byte": None}, {"version": "1"}, {"model": []}, {"step": True}])
def test_a_manifest_with_a_value_of_another_type_is_ignored(registry: Registry, values: dict[str, object]) -> None:
    publish(registry)
    _rewrite(version_folder(registry, 1), **values)
    (name,) = values
    with pytest.raises(CorruptCheckpoint, match=f"cannot be understood: {name} is "):
        disk_registry(root_of(registry)).version(1)
    assert disk_registry(root_of(registry)).versions() == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"step": 2**63}, "step is 9223372036854775808"),
        ({"parameters": 10**400}, "parameters is a number of about 400 digits"),
        ({"bits_per_byte": float("nan")}, "bits_per_byte is nan"),
        ({"validation_loss": float("-inf")}, "validation_loss is -inf"),
        ({"created_at": float("nan")}, "created_at is nan"),
        ({"preset": "p" * 100_000}, "preset has 100000 characters"),
        ({"dataset_files": ["f" * 5000]}, "dataset_files has 5000 characters"),
        ({"model": {"layers": 10**30}}, "model is 10{30}"),
        ({"training": {"rate": [{"deep": float("inf")}]}}, "training is inf"),
        ({"tokenizer": ["x" * 3000] * 100}, r"tokenizer is \['xx.*…"),
        ({"run": "../elsewhere"}, "run is '../elsewhere'"),
        ({"run": ""}, "run is ''"),
    ],
)
def test_a_manifest_with_an_excessive_value_is_ignored_with_a_short_reason(
    registry: Registry, values: dict[str, object], reason: str
) -> None:
    publish(registry)
    publish(registry)
    _rewrite(version_folder(registry, 1), **values)
    fresh = disk_registry(root_of(registry))
    assert [version.version for version in fresh.versions()] == [2]
    assert re.search(f"cannot be understood: {reason}", fresh.unreadable[1])
    assert len(fresh.unreadable[1]) <= 300 + len(str(root_of(registry)))


def test_an_error_names_the_missing_value_of_a_manifest(registry: Registry) -> None:
    publish(registry)
    path = version_folder(registry, 1) / "manifest.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("run", "sha256")}
    path.write_text(json.dumps(values))
    _rewrite(version_folder(registry, 1), sha256="")
    with pytest.raises(CorruptCheckpoint, match=r"cannot be understood: it has no run\."):
        disk_registry(root_of(registry)).version(1)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"9" * 6000, b"[]", b"null", b""])
def test_a_manifest_of_any_bytes_gives_one_short_error(registry: Registry, content: bytes) -> None:
    publish(registry)
    (version_folder(registry, 1) / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="cannot be understood") as raised:
        disk_registry(root_of(registry)).version(1)
    assert len(str(raised.value)) <= 300 + len(str(root_of(registry)))
