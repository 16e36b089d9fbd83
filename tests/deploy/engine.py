"""Builds and runs what the Dockerfile and compose.yaml describe, as plain processes in namespaces of the kernel.

Each has a root of its own with the programs of this machine, mounts, a user without rights, and a root that it cannot
write. The network is one, with the names of all services; limits, and what a registry or apt brings, are left out.
Packages are those of this Python. Needs root, and a process that has a mount, a network and a pid namespace.
"""

import fcntl
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from tests.deploy.compose import Mount, Service
from tests.deploy.dockerfile import Configuration, Stage, configuration_of, has_compiler, read_stages
from tests.waiting import HANG_S
from tests.workplace import PROJECT
from trainer_service.redis_server import find_redis_server

DOCKERFILE = PROJECT / "deploy/docker/Dockerfile"
_PROGRAMS = "/opt/programs"
_PATH = f"{_PROGRAMS}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_COMPILERS = ("gcc", "cc", "clang", "g++", "c++", "clang++")
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
    if (prometheus := shutil.which("prometheus")) and shutil.which("wget"):
        found["prom/prometheus"] = Foreign((Path(prometheus),), "65534:65534", "/prometheus", ("prometheus",))
    return found


@dataclass(frozen=True)
class Image:
    root: Path
    configuration: Configuration
    compiles: bool


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


class Container:
    """A root with mounts, in which one process is started and others may be run.

    mounts: a path here, a path in the container, and whether it is read-only.
    """

    def __init__(self, image: Image, mounts: Sequence[Mount], tmpfs: Sequence[str], is_read_only: bool) -> None:
        self.image = image
        self._mounts = mounts
        self._tmpfs = tmpfs
        self._is_read_only = is_read_only
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], output: int) -> subprocess.Popen[bytes]:
        script = "\n".join([*self._mount_lines(), f"exec chroot {_quoted(self.image.root)} {self._as_user(command)}"])
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self.process

    def run(self, *command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command beside the process, as `docker exec` does."""
        assert self.process is not None
        entered = f"nsenter --target {self.process.pid} --mount --root {self._as_user(command, user)}"
        return subprocess.run(["sh", "-euc", entered], capture_output=True, text=True, timeout=HANG_S)

    def _as_user(self, command: Sequence[str], user: str | None = None) -> str:
        configuration = self.image.configuration
        number, group = (user or configuration.user).split(":")
        environment = {"HOME": configuration.folder, **configuration.environment}
        # The container of a build step is root.
        rights = "--no-new-privs --inh-caps=-all --bounding-set=-all" if number != "0" else ""
        words = [f"--chdir={configuration.folder}", *(f"{name}={value}" for name, value in environment.items())]
        return (
            f"setpriv --reuid {number} --regid {group} --clear-groups {rights} env -i {shlex.join([*words, *command])}"
        )

    def _mount_lines(self) -> list[str]:
        root = self.image.root
        lines = [f"mount --bind {_quoted(root)} {_quoted(root)}"]

        def bind(source: str | Path, target: str, is_read_only: bool) -> None:
            place = root / target[1:]
            if not place.exists():
                if Path(source).is_dir():
                    place.mkdir(parents=True)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.touch()
            lines.append(f"mount --bind {_quoted(source)} {_quoted(place)}")
            if is_read_only:
                lines.append(f"mount -o remount,bind,ro {_quoted(place)}")

        for name in ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin"):
            if Path(name).is_dir() and not Path(name).is_symlink():
                bind(name, name, True)
        if not sys.base_prefix.startswith("/usr/"):
            bind(sys.base_prefix, sys.base_prefix, True)
        bind(sysconfig.get_path("purelib"), "/opt/packages", True)
        lines.append(f"mount --rbind /dev {_quoted(root / 'dev')}")
        lines.append(f"mount -t proc proc {_quoted(root / 'proc')}")
        for name in () if self.image.compiles else _COMPILERS:
            if (found := shutil.which(name)) and found.startswith(("/usr/", "/bin/")):
                lines.append(f"mount --bind /dev/null {_quoted(f'{root}{Path(found).resolve()}')}")
        for mount in self._mounts:
            bind(mount.source, mount.target, mount.is_read_only)
        for text in self._tmpfs:
            target, _, options = text.partition(":")
            lines.append(f"mount -t tmpfs -o noexec,nosuid,nodev,{options} tmpfs {_quoted(f'{root}{target}')}")
        if self._is_read_only:
            lines.append(f"mount -o remount,bind,ro {_quoted(root)}")
        return lines


class Engine:
    """The services of a compose.yaml, whose volumes, images and logs lie in a folder."""

    def __init__(self, services: Mapping[str, Service], composition: Path, folder: Path) -> None:
        self._services = services
        self._composition = composition
        self._folder = folder
        (folder / "images").mkdir()
        (folder / "logs").mkdir()
        self._builder = Builder(folder / "images")
        self._foreign = foreign_images()
        self._images: dict[str, Image] = {}
        self.containers: dict[str, Container] = {}
        self._hosts = folder / "hosts"
        self._hosts.write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *services)))

    def is_here(self, name: str) -> bool:
        """Whether the programs of a service are on this machine."""
        service = self._services[name]
        return service.target is not None or service.image.partition(":")[0] in self._foreign

    def start(self, name: str) -> Container:
        """Starts a service once those that it needs are as it needs them."""
        service = self._services[name]
        for other, condition in service.needs.items():
            self.wait(other, condition)
        image = self._image(service)
        mounts = [self._mount(mount, image) for mount in service.mounts]
        mounts.append(Mount(str(self._hosts), "/etc/hosts", True))
        container = Container(image, mounts, service.tmpfs, service.is_read_only)
        command = (
            [*image.configuration.command, *(service.command or [])]
            if service.target is None
            else (service.command or image.configuration.command)
        )
        with (self._folder / "logs" / name).open("ab") as log:
            container.start(command, log.fileno())
        self.containers[name] = container
        return container

    def wait(self, name: str, condition: str) -> None:
        container = self.containers[name]
        assert container.process is not None
        if condition == "service_completed_successfully":
            code = container.process.wait(HANG_S)
            assert code == 0, f"{name} ended with {code}:\n{self.log(name)}"
        else:
            assert condition == "service_healthy"
            process = container.process
            while (found := self.health(name)).returncode != 0:
                assert process.poll() is None, f"{name} ended:\n{self.log(name)}"
                print(f"{name}: {(found.stdout + found.stderr).strip()}", flush=True)
                time.sleep(0.5)

    def health(self, name: str) -> subprocess.CompletedProcess[str]:
        """Runs the health check of a service once."""
        container = self.containers[name]
        kind, *words = self._services[name].health or container.image.configuration.health
        return container.run(*(["sh", "-c", *words] if kind == "CMD-SHELL" else words))

    def stop(self, name: str) -> float:
        """Stops a service as `docker compose stop` does; returns its exit code. Fails if it does not end in time."""
        process = self.containers[name].process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        return process.wait(self._services[name].stop_s)

    def log(self, name: str) -> str:
        return (self._folder / "logs" / name).read_text(errors="replace")

    def _image(self, service: Service) -> Image:
        if service.image not in self._images:
            name = service.image.partition(":")[0]
            self._images[service.image] = (
                self._builder.image(service.target) if service.target else self._builder.foreign(self._foreign[name])
            )
        image = self._images[service.image]
        environment = {**image.configuration.environment, **service.environment}
        return replace(image, configuration=replace(image.configuration, environment=environment))

    def _mount(self, mount: Mount, image: Image) -> Mount:
        """Returns a mount of a folder or file here; a new volume belongs to the owner of its place in the image."""
        if not mount.is_volume:
            return replace(mount, source=str((self._composition.parent / mount.source).resolve()))
        volume = self._folder / "volumes" / mount.source
        if not volume.exists():
            volume.mkdir(parents=True)
            place = image.root / mount.target[1:]
            if place.exists():
                os.chown(volume, place.stat().st_uid, place.stat().st_gid)
        return replace(mount, source=str(volume))


def start_loopback() -> None:
    """Starts the loopback interface of a new network namespace."""
    up = 0x41  # IFF_UP and IFF_RUNNING
    set_flags = 0x8914  # SIOCSIFFLAGS
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh", b"lo", up))


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


def _copy_with_owner(source: str, target: str) -> str:
    shutil.copy2(source, target)
    return target


def _copy_owners(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        found = path.lstat()
        if found.st_uid or found.st_gid:
            os.chown(target / path.relative_to(source), found.st_uid, found.st_gid, follow_symlinks=False)
