"""The command `gptloop`, as its console script runs it: from any folder."""

import inspect
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from deploy.commands import COMMANDS, TOPICS
from tests.waiting import HANG_S
from tests.workplace import PROJECT

# As pip writes it.
SCRIPT = "import sys\nfrom deploy.cli import main\nsys.argv[0] = 'gptloop'\nmain()"
HEAVY = ("datasets", "google", "grpc", "mlx", "numpy", "prometheus_client", "pyarrow", "redis", "rq", "supervisor")


def gptloop(folder: Path, *words: str, script: str = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a folder."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GPTLOOP_", "REDIS_URL"))}
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *words],
        cwd=folder,
        env=own | {"PYTHONPATH": str(PROJECT)} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def help_of(name: str) -> str:
    command = COMMANDS[name].load()
    with typer.Context(command, info_name=name) as context:
        return str(command.get_help(context))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_begins_with_its_summary_and_has_an_example(name: str) -> None:
    command = COMMANDS[name].load()
    assert inspect.cleandoc(command.help).splitlines()[0] == COMMANDS[name].short_help
    assert f"gptloop {name}" in help_of(name).partition("Example")[2]


def test_every_command_of_the_services_and_the_stack_has_a_topic() -> None:
    import deploy.demo
    import deploy.service
    import deploy.stack
    import inference_service.__main__
    import trainer_service.__main__

    services = (inference_service.__main__.app, trainer_service.__main__.app)
    apps = (deploy.demo.app, deploy.service.app, deploy.stack.app, *services)
    found = {name for each in apps for name in typer.main.get_group(each).commands}
    of_processes = {"serve", "work", "rank", "redis", "measure"}
    assert found - of_processes == set(COMMANDS) - {"eval", "prepare"} | {"evaluate", "data"}


def test_the_examples_of_the_topics_name_commands_and_options_that_exist() -> None:
    for topic in TOPICS:
        program, name, *words = topic.example.split()
        options = {option for parameter in COMMANDS[name].load().params for option in parameter.opts}
        assert program == "gptloop" and name in {command.name for command in topic.commands}
        assert {word for word in words if word.startswith("--")} <= options


def test_help_lists_every_command_without_loading_the_services(tmp_path: Path) -> None:
    script = f"{SCRIPT[: -len('main()')]}try:\n    main()\nfinally:\n    print(*sys.modules)"
    ended = gptloop(tmp_path, "--help", script=script)
    *lines, modules = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stderr
    assert all(len(line) <= 88 for line in lines)
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= set(COMMANDS)
    assert not {module.partition(".")[0] for module in modules.split()} & set(HEAVY)


@pytest.mark.slow
def test_paths_start_in_the_folder_of_the_person_and_state_stays_in_the_project(tmp_path: Path) -> None:
    said = gptloop(tmp_path, "disk").stdout
    assert str(PROJECT / "var") in said
    (tmp_path / "state").mkdir()
    said = gptloop(tmp_path, "disk", GPTLOOP_VAR="state").stdout
    assert str(tmp_path / "state") in said and str(PROJECT / "var") not in said
    (tmp_path / "prompts.txt").touch()
    refused = gptloop(tmp_path, "generate", "--prompts", "prompts.txt")
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: 'prompts.txt' holds no prompt: it needs one on each line.\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "state"]


def test_version_is_the_one_of_the_project(tmp_path: Path) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert gptloop(tmp_path, "--version").stdout == f"gptloop {project['version']}\n"
    assert version("gptloop") == project["version"]
    assert project["scripts"] == {"gptloop": "deploy.cli:main"}


def test_a_misspelt_command_is_one_sentence_with_a_suggestion(tmp_path: Path) -> None:
    ended = gptloop(tmp_path, "trian")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: No such command 'trian'. Did you mean 'train'?\n"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("gptloop ver", ["versions", "verify"]),
        ("gptloop ch", ["chat", "checkpoints"]),
        ("gptloop --v", ["--version"]),
        ("gptloop eval --val", ["--validation"]),
    ],
)
def test_a_shell_completes_commands_and_options(tmp_path: Path, typed: str, completed: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert gptloop(tmp_path, _GPTLOOP_COMPLETE="complete_bash", **words).stdout.split() == completed


def test_a_script_for_the_completion_of_a_shell_is_printed(tmp_path: Path) -> None:
    shell = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ended = gptloop(tmp_path, "--show-completion", "zsh", **shell)
    assert ended.returncode == 0 and "#compdef gptloop" in ended.stdout


def test_without_arguments_help_is_shown(tmp_path: Path) -> None:
    assert gptloop(tmp_path).stdout == gptloop(tmp_path, "--help").stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="launchd always runs")
def test_services_for_a_systemd_that_does_not_run_are_written_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho offline\nexit 1\n")
    (tmp_path / "systemctl").chmod(0o755)
    var = str(tmp_path / "var")
    ended = gptloop(tmp_path, "service", "install", GPTLOOP_VAR=var, HOME=str(tmp_path / "home"), PATH=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "Written " in ended.stdout
    assert "systemd does not run for this user, so nothing can start the services yet." in ended.stdout
