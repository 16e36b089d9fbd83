"""Reads a Dockerfile: its stages, and what an image of a stage has."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from string import Template


@dataclass(frozen=True)
class Stage:
    """A stage: the image or stage that it starts from, and its instructions with their texts."""

    name: str
    parent: str
    instructions: list[tuple[str, str]]


@dataclass
class Configuration:
    """What an image tells the engine."""

    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


def read_stages(path: Path) -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        keyword, rest = line.split(maxsplit=1)
        if keyword == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = default
        elif keyword == "FROM":
            parent, _, name = Template(rest).substitute(arguments).partition(" AS ")
            stages[name] = Stage(name, parent, [])
        else:
            stages[name].instructions.append((keyword, rest))
    return stages


def configuration_of(stages: dict[str, Stage], name: str, base: dict[str, str]) -> Configuration:
    """Returns the configuration of the image of a stage. `base` is the environment of the image it starts from."""
    if name not in stages:
        return Configuration(dict(base))
    stage = stages[name]
    found = configuration_of(stages, stage.parent, base)
    for keyword, text in stage.instructions:
        match keyword:
            case "ENV":
                for word in shlex.split(text):
                    variable, _, value = word.partition("=")
                    found.environment[variable] = Template(value).substitute(found.environment)
            case "USER":
                found.user = text
            case "WORKDIR":
                found.folder = text
            case "CMD":
                found.command = json.loads(text)
            case "HEALTHCHECK":
                found.health = ["CMD", *json.loads(text.partition("CMD ")[2])]
    return found


def has_compiler(stages: dict[str, Stage], name: str) -> bool:
    """Whether a stage, or one that it starts from, installs g++."""
    if name not in stages:
        return False
    stage = stages[name]
    installs = any(keyword == "RUN" and "g++" in text for keyword, text in stage.instructions)
    return installs or has_compiler(stages, stage.parent)
