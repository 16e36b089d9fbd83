"""A process in namespaces of the kernel, as a container engine starts it: with a root, mounts and a user of its own.

The root has the programs of this machine and the packages of this Python. The user has no rights, and the root may be
read-only. Needs root, and a process that has a mount, a network and a pid namespace.
"""

import fcntl
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.compose import Mount
from tests.deploy.dockerfile import Configuration
from tests.waiting import HANG_S

_COMPILERS = ("gcc", "cc", "clang", "g++", "c++", "clang++")


@dataclass(frozen=True)
class Image:
    root: Path
    configuration: Configuration
    compiles: bool


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


def start_loopback() -> None:
    """Starts the loopback interface of a new network namespace."""
    up = 0x41  # IFF_UP and IFF_RUNNING
    set_flags = 0x8914  # SIOCSIFFLAGS
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh", b"lo", up))


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))
