"""Starts and stops the services of compose.yaml in their order, as plain processes.

All have one network, with the names of all services. A second one of a kind, such as `inference-2`, has an address of
its own, and each listens on its address instead of all. Limits are left out.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tests.deploy.builder import Builder, foreign_images
from tests.deploy.compose import Mount, Service
from tests.deploy.container import Container, Image
from tests.waiting import HANG_S


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
        self._hosts.write_text("".join(f"{address(name)} {name}\n" for name in ("localhost", *services)))

    def is_here(self, name: str) -> bool:
        """Whether the programs of a service are on this machine."""
        return self.has_programs(self._services[name])

    @staticmethod
    def has_programs(service: Service) -> bool:
        """Whether the programs of a service are on this machine."""
        return service.target is not None or service.image.partition(":")[0] in foreign_images()

    def is_running(self, name: str) -> bool:
        """Whether a service has been started and not ended."""
        process = self.containers[name].process
        return process is not None and process.poll() is None

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
            [*(service.entrypoint or image.configuration.command), *(service.command or [])]
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
            deadline_s = time.monotonic() + HANG_S / 2
            while (found := self.health(name)).returncode != 0:
                assert time.monotonic() < deadline_s, f"{name} is not healthy: {found}\n{self.log(name)}"
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
        own = {key: address(service.name) for key, value in environment.items() if value == "0.0.0.0"}
        environment |= own
        if environment.get("GPTLOOP_TLS_CA") and address(service.name) != address("localhost"):
            # The certificate has its name, and not this address.
            environment["GPTLOOP_TLS_SERVER_NAME"] = service.name
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


def address(name: str) -> str:
    """Returns the address of a service in the network of all."""
    return "127.0.0.2" if name.endswith("-2") else "127.0.0.1"
