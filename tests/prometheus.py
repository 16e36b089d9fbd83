"""A real Prometheus that scrapes services under test with the project's own configuration."""

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from shared.service.listening import free_port_numbers
from tests.monitoring import PROMETHEUS
from tests.waiting import HANG_S, wait_until

PROGRAM = shutil.which("prometheus")


class Prometheus:
    """The HTTP API of a server that scrapes and evaluates every second."""

    def __init__(self, port: int, process: "subprocess.Popen[bytes]") -> None:
        self._port = port
        self._process = process
        self._began = time.time()

    def is_ready(self) -> bool:
        """Returns whether it answers queries."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=HANG_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ended(self) -> bool:
        """Returns whether the process has ended."""
        return self._process.poll() is not None

    def ask(self, what: str, **parameters: str) -> Any:
        """Returns the data of an answer; fails with Prometheus' own words if the question is wrong."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._port}/api/v1/{what}?{query}", timeout=HANG_S
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{what} {parameters}: {error.read().decode()}") from None

    def has_data(self, expression: str) -> bool:
        """Returns whether an expression had a value that is a number at any second since the start."""
        found = self.ask("query_range", query=expression, start=str(self._began), end=str(time.time()), step="1")
        return any(not math.isnan(float(value)) for series in found["result"] for _, value in series["values"])


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Runs Prometheus with deploy/prometheus/prometheus.yml, whose targets are replaced by the names of their jobs."""
    assert PROGRAM is not None
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(PROMETHEUS / name) for name in configuration["rule_files"]]
    for job in configuration["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    (port,) = free_port_numbers(1)
    command = [PROGRAM, f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    process = subprocess.Popen(command)
    server = Prometheus(port, process)
    try:
        wait_until(server.is_ready, server.ended)
        yield server
    finally:
        process.terminate()
        process.wait(HANG_S)
