"""The pages name every command, setting, metric and file that exists, and nothing that does not exist."""

import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import typer
from prometheus_client import CollectorRegistry, generate_latest

import inference_service.__main__
import trainer_service.__main__
from deploy.commands import COMMANDS
from deploy.make import known_settings, variables
from inference_service.metrics import InferenceMetrics
from shared.device.accelerator import Memory
from shared.gpt.config import count_parameters
from tests.pages import CODE, PAGES, TEXT, WINGS, rows, sections, tables
from tests.registries import disk_registry
from tests.workplace import PROJECT
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.metrics import CallMetrics, make_metrics, show_certificate
from trainer_service.presets import PRESETS
from trainer_service.training.config import TrainingConfig

MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
# The variables of each target: those of the command that it runs, or those that it names itself.
VARIABLES: dict[str, Collection[str]] = {
    target: variables(command)
    for target, command in re.findall(r"^([a-z-]+):.*\n\t\$\(COMMAND\) (\S+)$", MAKEFILE, re.MULTILINE)
} | {
    target: names.split()
    for target, names in re.findall(r"^([a-z-]+):.*\n\t\$\(call TAKES,?(.*)\)$", MAKEFILE, re.MULTILINE)
}
# What deploy sets for the processes that it starts; nobody else should.
INTERNAL = {
    "GPTLOOP_EMBEDDED_REDIS",
    "GPTLOOP_GIVEN",
    "GPTLOOP_PYTHON",
    "GPTLOOP_ROOT",
    "GPTLOOP_SUPERVISOR_SOCKET",
    "GPTLOOP_WORKER_STOP_S",
}
# What only the tests read.
TESTS_ONLY = {"GPTLOOP_TEST_DATA"}


def empty_queue() -> JobQueue:
    """Returns a queue without jobs and without Redis."""
    store = SimpleNamespace(
        jobs=lambda: iter(()),
        open_jobs=lambda: [],
        counts=lambda: dict.fromkeys(JobState, 0),
        tokens=lambda: 0,
        diverged=lambda: 0,
        workers=SimpleNamespace(count=lambda: 0),
    )
    return cast(JobQueue, SimpleNamespace(store=store))


def require_same(documented: Collection[str], existing: Collection[str]) -> None:
    missing, extra = set(existing) - set(documented), set(documented) - set(existing)
    assert not missing, f"The pages leave out {sorted(missing)}."
    assert not extra, f"The pages name what does not exist: {sorted(extra)}."


def test_every_make_target_is_documented() -> None:
    named = re.findall(r"\bmake (?:-s )?(?:[A-Z]+=\S+ )*([a-z-]+)", CODE)
    require_same(named, re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def test_every_documented_variable_of_make_exists() -> None:
    known = {"ACCELERATOR", "PYTHON"} | {name for takes in VARIABLES.values() for name in takes}
    # Before `make`, or in the line of another command, stand variables of the environment.
    named = {name for words in re.findall(r"\bmake ([^\n;&|]*)", CODE) for name in re.findall(r"\b([A-Z_]+)=", words)}
    assert named, "No page gives make a variable."
    assert named <= known, f"The pages name what does not exist: {sorted(named - known)}."


def test_each_target_takes_the_variables_of_its_row() -> None:
    for command, what in rows("Commands"):
        target = re.findall(r"make ([a-z-]+)", command)[-1]
        named = set(re.findall(r"\b([A-Z_]+)=", f"{command} {what}"))
        assert named <= set(VARIABLES.get(target, ())), target


def test_each_command_takes_its_documented_options() -> None:
    lines = re.findall(r"\bgptloop ([a-z]+)([^\n|]*)", CODE)
    lines += [(*re.findall(r"gptloop ([a-z]+)", command), what) for command, what in rows("Commands")]
    for name, text in (line for line in lines if len(line) == 2):
        parameters = COMMANDS[name].load().params
        options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", text)) <= {*options, "--help"}, (name, text)


def test_every_environment_variable_is_documented() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for package in WINGS
        for path in (PROJECT / package).rglob("*")
        if path.suffix in (".py", ".conf")
    )
    own = r"\bGPTLOOP_[A-Z_]*[A-Z](?![A-Z_{*])"
    read = known_settings() | set(re.findall(rf'{own}|(?<=environ\.get\(")[A-Z0-9_]+', sources)) - INTERNAL
    documented = [row[0] for row in rows("Settings")]
    require_same(documented, read)
    assert len(documented) == len(set(documented)), "A setting stands in two tables."
    assert set(re.findall(own, TEXT)) - TESTS_ONLY <= read


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    metrics = InferenceMetrics(registry, lambda: Memory(1, 2, 3, 4), lambda: 5, lambda: 6, {"resident": 7})
    metrics.certificate(lambda: 8.0)
    training = make_metrics(empty_queue(), disk_registry(PROJECT / "var" / "none"))
    CallMetrics(training)
    show_certificate(training, lambda: 8.0)
    pages = (generate_latest(registry) + generate_latest(training)).decode()
    scraped = re.findall(r"^# TYPE (gptloop_\w+) (\w+)", pages, re.MULTILINE)
    # `_created` comes with every counter and histogram by itself.
    types = {name: kind for name, kind in scraped if not name.endswith("_created")}
    documented = {row[0]: row[1] for row in rows("Metrics")}
    require_same(documented, types)
    assert documented == types
    assert set(re.findall(r"\bgptloop_\w+", TEXT)) <= set(types)


def test_every_preset_is_documented_with_all_its_values() -> None:
    (((_, *names, _), parameters, *values),) = tables("Presets and their values")
    require_same(names, PRESETS)
    require_same([row[0] for row in values], [field.name for field in fields(TrainingConfig)])
    assert parameters[1:-1] == [f"{count_parameters(PRESETS[name].gpt).total:,}" for name in names]
    for value, *cells, meaning in values:
        expected = [getattr(PRESETS[name], value) for name in names]
        assert cells == [str(each).lower() if isinstance(each, bool) else str(each) for each in expected], value
        assert meaning, value


def test_the_file_trees_are_those_on_disk() -> None:
    trees = sections("Files")
    assert set(trees) == {f"{wing}/README.md" for wing in WINGS}
    named = set[Path]()
    for page, text in trees.items():
        (tree,) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
        folders = [str(Path(page).parent)]
        for line in tree.splitlines():
            depth = 1 + (len(line) - len(line.lstrip())) // 2
            folders[depth:] = [line.split()[0]]
            named.add(Path(*folders))
    absent = sorted(str(path) for path in named if not (PROJECT / path).exists())
    assert not absent, f"The pages name files that do not exist: {absent}."
    modules = {path.relative_to(PROJECT) for wing in WINGS for path in (PROJECT / wing).rglob("*.py")}
    unnamed = {
        str(path) for path in modules - named if path.name != "__init__.py" and path.parts[:2] != ("shared", "pb")
    }
    assert not unnamed, f"The pages leave out {sorted(unnamed)}."


@pytest.mark.parametrize(
    ("package", "app"),
    [("trainer_service", trainer_service.__main__.app), ("inference_service", inference_service.__main__.app)],
)
def test_every_documented_command_exists(package: str, app: typer.Typer) -> None:
    named = set(re.findall(rf"python -m {package} (\w+)", CODE))
    assert named
    assert named <= set(typer.main.get_group(app).commands)


def test_every_command_of_gptloop_is_documented() -> None:
    require_same(re.findall(r"\bgptloop ([a-z]+)", CODE), COMMANDS)


def test_every_link_leads_to_a_file() -> None:
    below = (page for folder in (*WINGS, "tests") for page in (PROJECT / folder).rglob("*.md"))
    for page in (*PROJECT.glob("*.md"), *below):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page} links to {target}, which does not exist."


def test_every_link_to_a_heading_leads_to_one() -> None:
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", text):
            other = (PROJECT / page).parent / target if target else PROJECT / page
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page} links to #{anchor} of {target or page}, which does not exist."


def test_the_first_page_is_short() -> None:
    assert len(PAGES["README.md"].encode()) <= 8192


def test_every_test_that_a_page_names_exists() -> None:
    pages = [page for page in PROJECT.rglob("*.md") if ".venv" not in page.parts and "var" not in page.parts]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    defined = {
        name
        for file in (PROJECT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named, "No page names a test."
    assert named <= defined, f"The pages name what does not exist: {sorted(named - defined)}."
