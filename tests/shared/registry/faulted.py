"""Runs in a separate process with faults.c loaded: python -m tests.shared.registry.faulted --help"""

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import GptloopError
from shared.registry.registry import Registry
from tests.registries import disk_registry, root_of
from tests.shared.registry.faults import DEATH, Faults, Mode
from tests.shared.registry.scenarios import BEGINNINGS, RUN, SCENARIOS, Scenario, observe, publish, write_state

app = typer.Typer(pretty_exceptions_enable=False)

Act = Callable[[], object]

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)


@app.command()
def sweep(
    library: Path,
    root: Path,
    scenario: Annotated[str, typer.Argument(help=f"One of {', '.join(SCENARIOS)}.")],
) -> None:
    """Disturbs each operation of a scenario in turn, in every mode, and prints the operations."""
    faults = Faults(library)
    for mode in (Mode.FAIL_ONCE, Mode.FAIL_ON, Mode.DIE):
        hits: list[str] = []
        while hit := _disturb(faults, SCENARIOS[scenario], disk_registry(root), mode, len(hits)):
            hits.append(hit)
        print(mode.name, *hits)


def _disturb(faults: Faults, scene: Scenario, registry: Registry, mode: Mode, n: int) -> str:
    """Disturbs the n-th operation and returns its name; returns an empty text if there are fewer."""
    fence = scene.prepare(registry)
    old = observe(root_of(registry))
    if mode is Mode.DIE:
        hit, failed = _die(faults, registry, partial(scene.act, registry, fence), n), True
    else:
        hit, failed = _fail(faults, registry, partial(scene.act, registry, fence), mode, n)
    place = f"operation {n}, {hit}: "
    new = observe(root_of(registry))
    assert scene.may_change(old, new), f"{place}{sorted(new ^ old)}"
    leftovers = list((root_of(registry) / "staging").iterdir())
    if mode is Mode.FAIL_ONCE and failed:
        assert not leftovers, place + "a failing write left something in staging"
        partly = ("fence", "finding", "history", "prune", "teachers", "teachers-go")
        assert scene in [SCENARIOS[name] for name in partly] or new == old, place + "visible"
        assert not list(root_of(registry).glob("**/*.new")), place + "a half-written text"
    if not failed:
        assert new != old, place + "nothing changed, but no error was raised"
    # In the same process, or as in the next one.
    next_registry = registry if n % 2 else disk_registry(root_of(registry))
    fence = next_registry.take_over(RUN)
    before = max(each.version for each in next_registry.versions())
    # The failed attempt may have used one number.
    assert before < publish(next_registry, fence).version <= before + 2, place + "the next version"
    write_state(next_registry, fence)
    disk_registry(root_of(registry)).sweep()
    assert not any((root_of(registry) / "staging").iterdir()), place + "a leftover was not swept"
    return hit


def _fail(faults: Faults, registry: Registry, act: Act, mode: Mode, n: int) -> tuple[str, bool]:
    faults.arm(root_of(registry), mode, n, ERRORS[n % len(ERRORS)])
    try:
        act()
    except GptloopError as raised:
        faults.disarm()
        assert str(root_of(registry)) in str(raised), f"operation {n}: {raised}"
        return faults.hit(), True
    finally:
        faults.disarm()
    return faults.hit(), False


def _die(faults: Faults, registry: Registry, act: Act, n: int) -> str:
    child = os.fork()
    if child == 0:
        faults.arm(root_of(registry), Mode.DIE, n)
        act()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DEATH), f"operation {n} ended with {code}"
    return "death" if code == DEATH else ""


@app.command()
def record(
    library: Path,
    world: Annotated[Path, typer.Argument(help="A folder that contains the registry as var/registry.")],
    scenario: Annotated[str, typer.Argument(help=f"One of {', '.join(SCENARIOS | BEGINNINGS)}.")],
    log: Path,
    before: Annotated[Path, typer.Argument(help="The place for a copy of the folder before the scenario.")],
) -> None:
    """Logs every file operation of a scenario."""
    scene, registry = (SCENARIOS | BEGINNINGS)[scenario], disk_registry(world / "var" / "registry")
    fence = scene.prepare(registry)
    shutil.copytree(world, before)
    with Faults(library).logged(world, log):
        scene.act(registry, fence)


if __name__ == "__main__":
    app()
