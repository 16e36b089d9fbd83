import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy.release_notes import notes
from tests.waiting import HANG_S
from tests.workplace import PROJECT

_CHANGELOG = """# Changelog

A release has a heading.

## Unreleased

- Not yet.

## 1.3.0 (2027-01-31)

- The first change, which
  needs two lines.
- The second one.

## 1.2.0 (2026-12-01)

## 1.1

- Too old.
"""


def test_the_notes_are_the_section_of_the_tag_with_an_entry_a_line() -> None:
    expected = "- The first change, which needs two lines.\n- The second one.\n"
    assert notes("v1.3.0", _CHANGELOG, "1.3.0") == expected


@pytest.mark.parametrize(
    ("tag", "version", "sentence"),
    [
        ("1.3.0", "1.3.0", "The tag is '1.3.0', but must be like v1.2.3."),
        ("v1.3", "1.3.0", "The tag is 'v1.3', but must be like v1.2.3."),
        ("v1.4.0", "1.3.0", "The tag is v1.4.0, but the version in pyproject.toml is 1.3.0."),
        ("v1.2.0", "1.2.0", "CHANGELOG.md has no entries under '1.2.0 (2026-12-01)'."),
        ("v1.4.0", "1.4.0", "CHANGELOG.md has no heading like '## 1.4.0 (2026-12-31)'."),
        ("v1.30.0", "1.30.0", "CHANGELOG.md has no heading like '## 1.30.0 (2026-12-31)'."),
    ],
)
def test_a_tag_without_notes_is_refused_in_one_sentence(tag: str, version: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        notes(tag, _CHANGELOG, version)


def test_the_changelog_of_the_project_can_be_released(tmp_path: Path) -> None:
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings[1:])
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    released = text.replace("## Unreleased", f"## Unreleased\n\n## {version} (2026-12-31)", 1)
    lines = notes(f"v{version}", released, version).splitlines()
    assert lines and all(line.startswith("- ") for line in lines)


@pytest.mark.slow
def test_the_command_needs_nothing_but_python(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    for name in ("__init__.py", "release_notes.py"):
        shutil.copy(PROJECT / "deploy" / name, tmp_path / "deploy")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.3.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(_CHANGELOG)

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-S", "-m", "deploy.release_notes", *arguments]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
        return ended.returncode, ended.stdout + ended.stderr

    assert run("v1.3.0") == (0, "- The first change, which needs two lines.\n- The second one.\n")
    assert run("v2.0.0") == (1, "error: The tag is v2.0.0, but the version in pyproject.toml is 1.3.0.\n")
