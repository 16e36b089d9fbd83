"""Reads compose.yaml as Compose does, with variables and profiles."""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Mount:
    source: str
    target: str
    is_read_only: bool

    @property
    def is_volume(self) -> bool:
        """Whether the source is the name of a volume, not a path."""
        return not self.source.startswith(".")


@dataclass(frozen=True)
class Service:
    """A service; what it leaves out is None or empty."""

    name: str
    image: str
    entrypoint: list[str]
    target: str | None
    command: list[str] | None
    environment: dict[str, str]
    user: str | None
    mounts: list[Mount]
    tmpfs: list[str]
    is_read_only: bool
    # The condition on each service that starts before.
    needs: dict[str, str]
    health: list[str] | None
    stop_s: float


def read_services(path: Path, variables: Mapping[str, str] | None = None) -> dict[str, Service]:
    """Returns the services without a profile and those of the profile that `COMPOSE_PROFILES` names."""
    given = variables or {}
    described = _interpolated(yaml.safe_load(path.read_text()), given)["services"]
    profile = given.get("COMPOSE_PROFILES", "")
    active = {name: what for name, what in described.items() if profile in what.get("profiles", [profile])}
    return {name: _service(name, what, active.keys()) for name, what in active.items()}


def _service(name: str, what: dict[str, Any], active: Set[str]) -> Service:
    health = what.get("healthcheck", {})
    grace = re.fullmatch(r"(\d+)s", what.get("stop_grace_period", "10s"))
    assert grace is not None
    return Service(
        name=name,
        image=what["image"],
        entrypoint=what.get("entrypoint", []),
        target=what.get("build", {}).get("target"),
        command=what.get("command"),
        environment={key: str(value) for key, value in what.get("environment", {}).items()},
        user=what.get("user"),
        mounts=[_mount(text) for text in what.get("volumes", ())],
        tmpfs=what.get("tmpfs", []),
        is_read_only=what.get("read_only", False),
        needs={
            other: condition["condition"]
            for other, condition in what.get("depends_on", {}).items()
            if other in active or condition.get("required", True)
        },
        health=None if health.get("disable") else health.get("test"),
        stop_s=float(grace[1]),
    )


def _mount(text: str) -> Mount:
    source, target, *options = text.split(":")
    return Mount(source, target, "ro" in options)


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """Replaces `${NAME:-default}`; Compose writes a dollar sign as two."""
    match value:
        case str():
            whole = r"\$\$|\$\{(\w+):-(.*?)\}"
            return re.sub(whole, lambda found: variables.get(found[1]) or found[2] if found[1] else "$", value)
        case list():
            return [_interpolated(each, variables) for each in value]
        case dict():
            return {key: _interpolated(each, variables) for key, each in value.items()}
    return value
