"""Reads compose.yaml."""

import re
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


def read_services(path: Path) -> dict[str, Service]:
    described = _unescaped(yaml.safe_load(path.read_text()))["services"]
    return {name: _service(name, what) for name, what in described.items()}


def _service(name: str, what: dict[str, Any]) -> Service:
    health = what.get("healthcheck", {})
    grace = re.fullmatch(r"(\d+)s", what.get("stop_grace_period", "10s"))
    assert grace is not None
    return Service(
        name=name,
        image=what["image"],
        target=what.get("build", {}).get("target"),
        command=what.get("command"),
        environment={key: str(value) for key, value in what.get("environment", {}).items()},
        user=what.get("user"),
        mounts=[_mount(text) for text in what.get("volumes", ())],
        tmpfs=what.get("tmpfs", []),
        is_read_only=what.get("read_only", False),
        needs={other: condition["condition"] for other, condition in what.get("depends_on", {}).items()},
        health=None if health.get("disable") else health.get("test"),
        stop_s=float(grace[1]),
    )


def _mount(text: str) -> Mount:
    source, target, *options = text.split(":")
    return Mount(source, target, "ro" in options)


def _unescaped(value: Any) -> Any:
    """Compose writes a dollar sign as two."""
    match value:
        case str():
            return value.replace("$$", "$")
        case list():
            return [_unescaped(each) for each in value]
        case dict():
            return {key: _unescaped(each) for key, each in value.items()}
    return value
