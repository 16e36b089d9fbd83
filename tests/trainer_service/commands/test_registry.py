import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shared.errors import InvalidArgument
from shared.registry.registry import Checkpoint, Registry
from shared.service.settings import Directories
from tests.registries import disk_registry, root_of, run_folder, state_folder, version_folder
from tests.shared.registry.scenarios import make_manifest, take_teachers, write_model
from trainer_service.commands.registry import app


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Four versions with their states, the second of them the best."""
    registry = disk_registry(Directories(tmp_path).registry)
    fence = registry.take_over("run-1")
    for number in range(1, 5):
        registry.write_state(fence, 10 * number, write_model)
        registry.publish_version(
            fence,
            write_model,
            lambda number, files: make_manifest(number, files, bits_per_byte=0.5 if number == 2 else 1.0),
        )
    return registry


def run(registry: Registry, *arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"GPTLOOP_VAR": str(root_of(registry).parent)} | environment)


def rows(result: Result) -> dict[str, str]:
    """Returns the rows of a table, by their first two words."""
    return {" ".join(line.split()[:2]): " ".join(line.split()) for line in result.output.splitlines() if line.strip()}


def test_verify_says_that_all_is_whole(registry: Registry) -> None:
    result = run(registry, "verify")
    assert (result.exit_code, result.output) == (0, "Whole: 4 versions and 4 states.\n")


def test_verify_names_all_that_is_broken_and_what_to_do(registry: Registry) -> None:
    (version_folder(registry, 1) / "config.json").write_text("{ }")
    (version_folder(registry, 3) / "manifest.json").write_bytes(b"\xff")
    (state_folder(registry, "run-1", 20) / "model.safetensors").unlink()
    (root_of(registry) / "versions" / "backup").mkdir()
    (root_of(registry) / "runs" / os.fsdecode(b"two\nlines\xff")).mkdir()
    result = run(registry, "verify")
    assert result.exit_code == 1
    table = rows(result)
    assert "config.json has 3 bytes, but its manifest says 2." in table["version 1"]
    assert "manifest.json cannot be understood" in table["version 3"]
    assert "lacks files of its manifest: model.safetensors is missing" in table["state 20"]
    assert "no such name" in table["backup The"]
    assert "version 2" not in table and "version 4" not in table
    assert r"two\nlines" in result.output and "two\n" not in result.output
    assert "5 broken, looked at 4 versions and 4 states." in result.output
    for path in (version_folder(registry, 1), state_folder(registry, "run-1", 20)):
        assert f"  {path}\n" in result.output


def test_verify_looks_at_the_teachers_of_runs(registry: Registry) -> None:
    take_teachers(registry, registry.take_over("student"), 1)
    registry.remove(Checkpoint(1))
    assert run(registry, "verify").exit_code == 0
    ((run_folder(registry, "student") / "teachers") / "1" / "config.json").write_text("{ }")
    result = run(registry, "verify")
    assert result.exit_code == 1 and "config.json has 3 bytes" in rows(result)["teachers of"]
    assert f"  {(run_folder(registry, 'student') / 'teachers')}\n" in result.output


def test_prune_shows_why_each_stays_or_goes_and_removes_what_goes(registry: Registry) -> None:
    result = run(registry, "prune", "--dry-run", "--newest", "1", "--best", "1", "--states", "1")
    assert result.exit_code == 0
    table = rows(result)
    assert table["version 1"].endswith("MiB would go nothing keeps it")
    assert table["version 2"].endswith("stays label best, best 1 of its evaluation set")
    assert table["version 4"].endswith("stays label latest, newest 1")
    assert table["state 20"].endswith("stays state of version 2")
    assert "2 versions and 2 states would be removed: 0.0 MiB." in result.output
    assert len(registry.versions()) == 4

    result = run(registry, "prune", "--newest", "1", GPTLOOP_KEEP_BEST="1", GPTLOOP_KEEP_STATES="1")
    assert rows(result)["version 1"].endswith("goes nothing keeps it")
    assert "2 versions and 2 states removed" in result.output
    assert [manifest.version for manifest in registry.versions()] == [2, 4]
    assert registry.states("run-1") == [20, 40]


def test_prune_names_a_value_that_cannot_be(registry: Registry) -> None:
    result = run(registry, "prune", "--states", "0")
    assert isinstance(result.exception, InvalidArgument)
    assert str(result.exception) == "states is 0, but must be from 1 to 1000000."
    assert len(registry.versions()) == 4


def test_an_empty_registry_is_whole_and_has_nothing_to_prune(tmp_path: Path) -> None:
    registry = disk_registry(Directories(tmp_path).registry)
    assert run(registry, "verify").output == "Whole: 0 versions and 0 states.\n"
    assert "Nothing to prune" in run(registry, "prune").output
    assert not root_of(registry).exists()


def test_disk_says_what_takes_how_much_and_what_makes_it_less(registry: Registry) -> None:
    table = run(registry, "disk").output
    assert re.search(r"versions +0\.\d MiB", table) and "GPTLOOP_KEEP_BYTES" in table and "All of it: 0." in table
    sizes = {row["what"]: row["size_bytes"] for row in json.loads(run(registry, "disk", "--json").output)}
    assert sizes["versions"] == sum(
        path.stat().st_size for path in (root_of(registry) / "versions").rglob("*") if path.is_file()
    )
    assert list(sizes) == [
        "versions",
        "states, teachers, histories",
        "evaluations",
        "reports",
        "stories",
        "judgements",
        "prepared text",
        "jobs",
        "logs",
        "copies of the registry",
        "compiled",
        "other",
    ]


def test_prune_says_what_a_limit_on_size_takes_and_what_it_cannot_take(registry: Registry) -> None:
    result = run(registry, "prune", "--dry-run", GPTLOOP_KEEP_BYTES="1")
    table = rows(result)
    assert table["version 1"].endswith("would go GPTLOOP_KEEP_BYTES leaves it no room")
    assert "stays" in table["version 2"] and "stays" in table["version 4"]
    assert "larger than GPTLOOP_KEEP_BYTES, and nothing of it can go." in result.output
    assert "larger" not in run(registry, "prune", "--dry-run", GPTLOOP_KEEP_BYTES="1G").output
    result = run(registry, "prune", GPTLOOP_KEEP_BYTES="1K5")
    assert isinstance(result.exception, InvalidArgument) and "GPTLOOP_KEEP_BYTES is '1K5'" in str(result.exception)


def test_prune_leaves_what_a_job_waits_for_while_redis_does_not_say_that_it_ended(registry: Registry) -> None:
    registry.holds.add("12ab", 1)
    result = run(registry, "prune", "--newest", "1", "--best", "1", "--states", "1", REDIS_URL="")
    assert rows(result)["version 1"].endswith("stays job 12ab waits for it")
    assert [manifest.version for manifest in registry.versions()] == [1, 2, 4]
