"""The README names what a person can type, set and read, all of it, and nothing that does not exist."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from prometheus_client import CollectorRegistry, generate_latest

import inference_service.__main__
import inference_service.settings
import trainer_service.__main__
import trainer_service.settings
from deploy.make import app_of, variables
from deploy.ports import listening_host, read_ports
from inference_service.metrics import InferenceMetrics
from shared.device.accelerator import Memory
from shared.gpt.config import count_parameters
from trainer_service.jobs.events import JobState
from trainer_service.jobs.kinds import Kind
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.metrics import CallMetrics, make_metrics
from trainer_service.presets import PRESETS
from trainer_service.training.config import TrainingConfig

PROJECT = Path(__file__).parents[1]
PACKAGES = ("shared", "trainer_service", "inference_service", "deploy")
README = (PROJECT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
# Blocks and spans of code, one a line or more.
CODE = "\n".join(
    block or span for block, span in re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", README, re.DOTALL | re.MULTILINE)
)
# The variables of each target: those of the command that it runs, or those that it names itself.
VARIABLES: dict[str, Collection[str]] = {
    target: variables(app_of(module), path.split())
    for target, module, path in re.findall(r"^([a-z-]+):.*\n\t\$\(COMMAND\) (\S+) ?(.*)$", MAKEFILE, re.MULTILINE)
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


class AskedNames(Mapping[str, str]):
    """An empty environment that remembers which variables were asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class EmptyQueue(JobQueue):
    """A queue on which nothing was ever put, without Redis."""

    def __init__(self) -> None:
        pass

    def jobs(
        self, states: Sequence[JobState] = (), kinds: Sequence[Kind] = (), before: int | None = None
    ) -> Iterator[JobRecord]:
        return iter(())

    def live_workers(self) -> int:
        return 0

    def waiting(self) -> int:
        return 0

    def counts(self) -> dict[JobState, int]:
        return dict.fromkeys(JobState, 0)

    def tokens(self) -> int:
        return 0


def section(title: str) -> str:
    """The text between a heading and the next one of any level."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README, re.DOTALL | re.MULTILINE)
    return str(text)


def rows(title: str) -> list[list[str]]:
    """The cells of a section's tables, headings too, without the marks of code."""
    lines = [line for line in section(title).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def require_same(documented: Collection[str], existing: Collection[str]) -> None:
    missing, extra = set(existing) - set(documented), set(documented) - set(existing)
    assert not missing, f"The README leaves out {sorted(missing)}."
    assert not extra, f"The README names what does not exist: {sorted(extra)}."


def test_every_make_target_stands_in_the_readme() -> None:
    named = re.findall(r"\bmake (?:-s )?(?:[A-Z]+=\S+ )*([a-z-]+)", CODE)
    require_same(named, re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def test_every_variable_of_make_in_the_readme_exists() -> None:
    known = {"ACCELERATOR", "PYTHON"} | {name for takes in VARIABLES.values() for name in takes}
    named = set(re.findall(r"\b([A-Z_]+)=", CODE))
    assert named <= known, f"The README names what does not exist: {sorted(named - known)}."


def test_each_target_takes_the_variables_that_its_row_names() -> None:
    for command, what in rows("Commands")[1:]:
        target = command.split()[-1 if "=" not in command else 1]
        named = set(re.findall(r"\b([A-Z_]+)=", f"{command} {what}"))
        assert named <= set(VARIABLES.get(target, ())), target


def test_every_environment_variable_stands_in_the_readme() -> None:
    environment = AskedNames()
    inference_service.settings.read_settings(environment)
    trainer_service.settings.read_settings(environment)
    read_ports(environment)
    for service in ("INFERENCE", "TRAINER"):
        listening_host(environment, service)
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in (PROJECT / package).rglob("*")
        if path.suffix in (".py", ".conf")
    )
    own = r"\bGPTLOOP_[A-Z_]*[A-Z](?![A-Z_{*])"
    read = environment.names | set(re.findall(rf'{own}|(?<=environ\.get\(")[A-Z_]+', sources)) - INTERNAL
    require_same([row[0] for row in rows("Settings")[1:]], read)
    assert set(re.findall(own, README)) <= read


def test_every_metric_stands_in_the_readme() -> None:
    registry = CollectorRegistry()
    InferenceMetrics(registry, lambda: Memory(1, 2, 3, 4), lambda: 5, lambda: 6)
    training = make_metrics(EmptyQueue())
    CallMetrics(training)
    pages = (generate_latest(registry) + generate_latest(training)).decode()
    scraped = re.findall(r"^# TYPE (gptloop_\w+) (\w+)", pages, re.MULTILINE)
    # `_created` comes with every counter and histogram by itself.
    types = {name: kind for name, kind in scraped if not name.endswith("_created")}
    documented = {row[0]: row[1] for row in rows("Metrics") if row[0] != "metric"}
    require_same(documented, types)
    assert documented == types
    assert set(re.findall(r"\bgptloop_\w+", README)) <= set(types)


def test_every_preset_stands_in_the_readme_with_all_its_values() -> None:
    (_, *names, _), parameters, *values = rows("Presets and their values")
    require_same(names, PRESETS)
    require_same([row[0] for row in values], [field.name for field in fields(TrainingConfig)])
    assert parameters[1:-1] == [f"{count_parameters(PRESETS[name].gpt).total:,}" for name in names]
    for value, *cells, meaning in values:
        expected = [getattr(PRESETS[name], value) for name in names]
        assert cells == [str(each).lower() if isinstance(each, bool) else str(each) for each in expected], value
        assert meaning, value


def test_the_file_tree_is_the_one_on_disk() -> None:
    (tree,) = re.findall(r"```\n(.*?)```", section("Files"), re.DOTALL)
    named, folders = set[Path](), list[str]()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [line.split()[0]]
        named.add(Path(*folders))
    absent = sorted(str(path) for path in named if not (PROJECT / path).exists())
    assert not absent, f"The README names files that do not exist: {absent}."
    modules = {path.relative_to(PROJECT) for package in PACKAGES for path in (PROJECT / package).rglob("*.py")}
    unnamed = {
        str(path) for path in modules - named if path.name != "__init__.py" and path.parts[:2] != ("shared", "pb")
    }
    assert not unnamed, f"The README leaves out {sorted(unnamed)}."


@pytest.mark.parametrize(
    ("package", "app"),
    [("trainer_service", trainer_service.__main__.app), ("inference_service", inference_service.__main__.app)],
)
def test_every_command_in_the_readme_exists(package: str, app: typer.Typer) -> None:
    named = set(re.findall(rf"python -m {package} (\w+)", CODE))
    assert named
    assert named <= set(typer.main.get_group(app).commands)


def test_every_link_leads_to_a_file() -> None:
    for page in PROJECT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (PROJECT / target).exists(), f"{page.name} links to {target}, which does not exist."
