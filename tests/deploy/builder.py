"""Builds the stages of the Dockerfile as folders, with this machine's programs for the base image and for apt, and with
this Python's packages for those of the locks."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from tests.deploy.container import Container, Image
from tests.deploy.dockerfile import Configuration, Stage, configuration_of, has_compiler, read_stages
from tests.waiting import HANG_S
from tests.workplace import PROJECT
from trainer_service.redis_server import find_redis_server

DOCKERFILE = PROJECT / "deploy/docker/Dockerfile"
_PROGRAMS = "/opt/programs"
_PATH = f"{_PROGRAMS}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
# Commands of a Dockerfile that need what is not here.
_NOT_HERE = ("apt-get ", "rm -rf /var/lib/apt/lists/")


@dataclass(frozen=True)
class Foreign:
    """An image that others publish: its programs, its user, the folder that the user owns, and its entry point."""

    programs: tuple[Path, ...]
    user: str
    folder: str
    entry: tuple[str, ...] = ()


def foreign_images() -> dict[str, Foreign]:
    """Returns those whose programs are on this machine, by the name of the image."""
    server, _ = find_redis_server()
    clients = [server.with_name("redis-cli"), *(Path(found) for found in [shutil.which("redis-cli")] if found)]
    found = {"redis": Foreign((server, next(client for client in clients if client.exists())), "999:999", "/data")}
    if (weed := Path(sys.prefix, "bin", "weed")).exists() and shutil.which("wget"):
        found["chrislusf/seaweedfs"] = Foreign((weed,), "1000:1000", "/data")
    if (prometheus := shutil.which("prometheus")) and shutil.which("wget"):
        found["prom/prometheus"] = Foreign((Path(prometheus),), "65534:65534", "/prometheus", ("prometheus",))
    return found


class Builder:
    """Builds the stages of the Dockerfile in a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stages = read_stages(DOCKERFILE)
        self._built: dict[str, Path] = {}

    def image(self, target: str) -> Image:
        configuration = configuration_of(self._stages, target, {"PATH": _PATH})
        return Image(self._build(target), configuration, has_compiler(self._stages, target))

    def foreign(self, foreign: Foreign) -> Image:
        root = new_root(self._folder / foreign.programs[0].name)
        for program in foreign.programs:
            shutil.copy(program, root / _PROGRAMS[1:])
        owned = root / foreign.folder[1:]
        owned.mkdir()
        os.chown(owned, *map(int, foreign.user.split(":")))
        return Image(root, Configuration({"PATH": _PATH}, foreign.user, command=list(foreign.entry)), compiles=False)

    def _build(self, name: str) -> Path:
        if name not in self._built:
            stage = self._stages[name]
            root = self._folder / name
            if stage.parent in self._stages:
                shutil.copytree(self._build(stage.parent), root, symlinks=True, copy_function=_copy_with_owner)
                _copy_owners(self._build(stage.parent), root)
            else:
                new_root(root)
            self._carry_out(stage, root)
            self._built[name] = root
        return self._built[name]

    def _carry_out(self, stage: Stage, root: Path) -> None:
        seen = configuration_of(self._stages, stage.parent, {"PATH": _PATH})
        for place, (keyword, text) in enumerate(stage.instructions):
            until = replace(stage, instructions=stage.instructions[: place + 1])
            seen = configuration_of({**self._stages, stage.name: until}, stage.name, {"PATH": _PATH})
            match keyword:
                case "WORKDIR":
                    (root / text[1:]).mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(text.split(), root, seen.folder)
                case "RUN":
                    self._run(text, root, seen)

    def _copy(self, words: list[str], root: Path, folder: str) -> None:
        *options, target = words
        if options[0].startswith("--from="):
            source = self._build(options.pop(0).removeprefix("--from="))
            shutil.copytree(source / options[0][1:], root / target[1:], symlinks=True, dirs_exist_ok=True)
            return
        for name in options:
            assert is_in_context(name), f"{name} is not in the context: .dockerignore leaves it out."
            to = Path(f"{root}{folder}", target)
            if (PROJECT / name).is_dir():
                shutil.copytree(PROJECT / name, to, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
            else:
                to = to / Path(name).name if target.endswith("/") else to
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / name, to)

    def _run(self, text: str, root: Path, configuration: Configuration) -> None:
        for part in map(str.strip, text.split("&&")):
            if part.startswith(_NOT_HERE):
                continue
            if "--require-hashes" in part:
                # The packages of this Python stand for those of the lock.
                environment = "/opt/venv" if "--python /opt/venv" in part else "/opt/build"
                (packages,) = root.glob(f"{environment[1:]}/lib/python*/site-packages")
                (packages / "locked.pth").write_text("/opt/packages\n")
                continue
            container = Container(Image(root, configuration, compiles=True), [], [], is_read_only=False)
            built = container.start(["sh", "-euc", part], subprocess.PIPE)
            output, _ = built.communicate(timeout=HANG_S)
            assert built.returncode == 0, f"{part}\n{output.decode()}"


def new_root(root: Path) -> Path:
    """Makes a root like that of a base image, on which the folders of this machine are mounted later."""
    for name in ("etc", "proc", "dev", "tmp", "run", "usr", "var/lib", "var/tmp", "opt/packages", _PROGRAMS[1:]):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if (found := Path("/", name)).is_symlink():
            (root / name).symlink_to(found.readlink())
        elif found.is_dir():
            (root / name).mkdir()
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache", "login.defs"):
        if (found := Path("/etc", name)).exists():
            shutil.copy(found, root / "etc" / name)
    for name in ("ssl", "alternatives"):
        if (found := Path("/etc", name)).exists():
            shutil.copytree(found, root / "etc" / name, symlinks=True, ignore=shutil.ignore_patterns("private"))
    (root / _PROGRAMS[1:] / "python").symlink_to(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    return root


def is_in_context(name: str) -> bool:
    """Whether the context of the build has a path, by the rules of .dockerignore; the last one that matches decides."""
    found = True
    for rule in (PROJECT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch(name, rule.removeprefix("!")):
            found = rule.startswith("!")
    return found


def _copy_with_owner(source: str, target: str) -> str:
    shutil.copy2(source, target)
    return target


def _copy_owners(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        found = path.lstat()
        if found.st_uid or found.st_gid:
            os.chown(target / path.relative_to(source), found.st_uid, found.st_gid, follow_symlinks=False)
