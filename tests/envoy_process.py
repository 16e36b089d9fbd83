"""Envoy as a process with the configuration of deploy/envoy, on ports of this machine."""

import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from shared.service.listening import free_port_numbers
from tests.waiting import HANG_S, wait_until
from tests.workplace import PROJECT

PROGRAM = Path(sys.prefix) / "validators" / "bin" / "envoy"
FOLDER = PROJECT / "deploy" / "envoy"
MISSING = "Envoy is not installed: make .venv/validators"
_OPTIONS = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
# The folder of certificates in deploy/envoy.
_TLS = "/run/secrets/gptloop/tls"


class Envoy:
    """Envoy in front of replicas on these ports.

    certificates: a folder with `tls.crt`, `tls.key` and `ca.crt`.
    """

    def __init__(self, folder: Path, certificates: Path, replicas: Sequence[int]) -> None:
        folder.mkdir()
        port, self._admin_port = free_port_numbers(2)
        self.address = f"127.0.0.1:{port}"
        for name in ("certificate.yaml", "authority.yaml"):
            (folder / name).write_text((FOLDER / name).read_text("utf-8").replace(_TLS, str(certificates)))
        configuration = self._configuration(port, replicas, folder)
        (folder / "envoy.yaml").write_text(yaml.safe_dump(configuration))
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [PROGRAM, *_OPTIONS, "--config-path", folder / "envoy.yaml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._is_ready, lost=lambda: self.process.poll() is not None)

    def _configuration(self, port: int, replicas: Sequence[int], folder: Path) -> Any:
        text = (FOLDER / "envoy.yaml").read_text("utf-8").replace("/etc/envoy/", f"{folder}/")
        configuration = yaml.safe_load(text)
        configuration["admin"]["address"]["socket_address"]["port_value"] = self._admin_port
        (listener,) = configuration["static_resources"]["listeners"]
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
        (cluster,) = configuration["static_resources"]["clusters"]
        (endpoints,) = cluster["load_assignment"]["endpoints"]
        endpoints["lb_endpoints"] = [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": each}}}}
            for each in replicas
        ]
        return configuration

    def _ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin_port}{path}", timeout=HANG_S) as answer:
            return str(answer.read().decode())

    def _is_ready(self) -> bool:
        try:
            return self._ask("/ready").strip() == "LIVE"
        except OSError:
            return False

    def statistics(self) -> dict[str, int]:
        """Returns the counters and gauges of the replicas, such as `upstream_rq_retry`."""
        lines = self._ask("/stats?filter=^cluster\\.inference\\.").splitlines()
        pairs = (line.removeprefix("cluster.inference.").split(": ") for line in lines)
        return {name: int(value) for name, value in pairs if value.isdecimal()}

    def end(self) -> None:
        """Stops it."""
        self.process.terminate()
        self.process.wait(HANG_S)
