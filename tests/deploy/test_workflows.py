import re

import pytest

from tests.workplace import PROJECT

WORKFLOWS = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT / ".github/workflows").glob("*.yml")}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_only_unless_a_job_needs_more_and_runs_pinned_actions(name: str) -> None:
    text = WORKFLOWS[name]
    assert "\npermissions:\n  contents: read\n\n" in text
    for action in re.findall(r"uses: (\S+)", text):
        assert action.startswith("./") or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_workflows_call_targets_that_exist() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    called = re.findall(r"run: make (?:PYTHON=.*?}} )?(.*)", "".join(WORKFLOWS.values()))
    targets = {word for line in called for word in line.split()}
    assert targets > {"check", "test", "demo"}
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) or target == ".venv/bin/gptloop", target


def test_the_images_are_those_of_the_dockerfile() -> None:
    dockerfile = (PROJECT / "deploy/docker/Dockerfile").read_text(encoding="utf-8")
    targets = set(re.findall(r"target: ([\w-]+)", WORKFLOWS["release"]))
    assert targets == set(re.findall(r"^FROM base AS ([\w-]+)$", dockerfile, re.MULTILINE))


def test_images_are_pushed_for_tags_only() -> None:
    assert "docker" not in WORKFLOWS["check"]
    (triggers,) = re.findall(r"\non:\n(.*?)\n\n", WORKFLOWS["release"], re.DOTALL)
    assert triggers == '  push:\n    tags: ["v*"]'


def test_the_workflow_and_the_script_install_what_tests_can_use() -> None:
    def installed(text: str) -> set[str]:
        lines = re.findall(r"\bmake .*\.venv/.*", text, re.MULTILINE)
        return {word for line in lines for word in line.split() if word.startswith(".venv/")} - {".venv/bin/gptloop"}

    script = (PROJECT / ".ci/run").read_text(encoding="utf-8")
    assert installed(script) == installed(WORKFLOWS["check"]) >= {".venv/validators"}


def test_the_check_has_the_tags_with_which_it_compares_the_contracts() -> None:
    assert "fetch-depth: 0" in WORKFLOWS["check"]
