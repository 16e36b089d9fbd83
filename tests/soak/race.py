"""Lets many processes publish into one registry at once: every version has a number of its own, and is whole.

`python -m tests.soak.race --publishers 64 --store objects`
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import GptloopError
from shared.registry.manifest import FileRecord, VersionManifest
from shared.registry.registry import Checkpoint
from shared.service import cli
from shared.service.lists import print_rows
from tests.object_storage.kinds import Kind, describe, place_of
from tests.registries import own_registry
from tests.shared.registry.scenarios import make_manifest
from tests.workplace import PROJECT


@dataclass(frozen=True)
class Outcome:
    """What came of a race: the numbers that each run got, how long it took, and what is wrong."""

    numbers: Mapping[str, list[int]]
    seconds: float
    violations: list[str]


def race(publishers: int, each: int) -> Outcome:
    """Starts publishers with the registry of this process, lets all begin at once, and checks what they left."""
    command = [sys.executable, "-m", "tests.soak.race", "--each", str(each), "--child"]
    children = {
        run: subprocess.Popen([*command, run], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for run in (f"run-{number}" for number in range(publishers))
    }
    for child in children.values():
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", "a publisher did not start"
    begin = time.monotonic()
    for child in children.values():
        assert child.stdin is not None
        child.stdin.close()
    violations: list[str] = []
    numbers: dict[str, list[int]] = {}
    for run, child in children.items():
        assert child.stdout is not None
        with child:
            numbers[run] = [int(line) for line in child.stdout]
        if child.returncode or len(numbers[run]) != each:
            violations.append(
                f"{run} published {len(numbers[run])} of {each} versions and ended with {child.returncode}"
            )
    seconds = time.monotonic() - begin
    return Outcome(numbers, seconds, violations + _check(numbers))


def _check(numbers: Mapping[str, list[int]]) -> list[str]:
    registry = own_registry()
    wrong = []
    owner = {number: run for run, own in numbers.items() for number in own}
    if len(owner) != sum(map(len, numbers.values())):
        wrong.append("a number was given twice")
    found = {version.version: version.run for version in registry.versions()}
    if found != owner:
        odd = sorted({*found.items()} ^ {*owner.items()})[:5]
        wrong.append(f"the registry does not have what the publishers were told: {odd}")
    for number in found:
        try:
            registry.check(Checkpoint(number))
        except GptloopError as error:
            wrong.append(str(error))
    return wrong


def publish(run: str, each: int) -> None:
    """Publishes versions of a run once standard input is closed, and prints their numbers."""
    registry = own_registry()
    fence = registry.take_over(run)

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(os.urandom(1 << 12))
        (folder / "config.json").write_text("{}", encoding="utf-8")

    def manifest(number: int, files: tuple[FileRecord, ...]) -> VersionManifest:
        return make_manifest(number, files, run=run)

    print("ready", flush=True)
    sys.stdin.read()
    for _ in range(each):
        print(registry.publish_version(fence, write, manifest).version, flush=True)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def main(
    publishers: Annotated[int, typer.Option(min=1, help="Processes that publish.")] = 64,
    each: Annotated[int, typer.Option(min=1, help="Versions that each of them publishes.")] = 10,
    store: Annotated[Kind, typer.Option(help="Where the registry is.")] = Kind.OBJECTS,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if child is not None:
        publish(child, each)
        return
    folder = Path(tempfile.mkdtemp(prefix="gptloop-race-"))
    try:
        with place_of(store, folder) as count:
            outcome = race(publishers, each)
            requests = describe(count())
    finally:
        shutil.rmtree(folder)
    versions = sum(map(len, outcome.numbers.values()))
    print_rows(
        ("store", "publishers", "versions", "seconds", "requests", "violations"),
        [(store, str(publishers), str(versions), f"{outcome.seconds:.1f}", requests, str(len(outcome.violations)))],
    )
    for violation in outcome.violations:
        print(violation)
    if outcome.violations:
        raise typer.Exit(1)


if __name__ == "__main__":
    cli.run(app)
