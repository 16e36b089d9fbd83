"""A server that requires a token of operators, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inference_service.client import AdminClient, Credentials
from shared.gpt.config import GPTConfig
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.registry.manifest import VersionManifest
from tests.fakes import TINY, publish_tiny_version
from tests.inference_service.process import Server
from tests.token_files import write_tokens
from tests.waiting import wait_until

TOKEN = "open-sesame-at-once"


def operator_tokens(var: Path) -> str:
    """Writes a file of tokens beside a folder of state; returns its path."""
    return str(write_tokens(var.with_name("operators"), f"olga {TOKEN}"))


class Operated:
    """A server with a token, and a client of each kind."""

    def __init__(self, var: Path) -> None:
        self.server = Server(var, GPTLOOP_OPERATOR_TOKENS=operator_tokens(var))
        self.admin = AdminClient(self.server.address, Credentials(token=TOKEN))
        self.client = self.server.client()

    def publish(self, config: GPTConfig = TINY, better_by: float = 0.0) -> VersionManifest:
        """Publishes a version with fewer bits per byte than all before."""
        count = len(self.server.registry.versions())
        return publish_tiny_version(self.server.registry, 8.0 / (count + 1), config=config, better_by=better_by)

    def publish_serving(self, config: GPTConfig = TINY) -> int:
        """Publishes a version, waits until it serves as the best one, and returns its number."""
        number = self.publish(config).version
        self.admin.set_policy("best")
        self.await_serving(number)
        return number

    def status(self, number: int) -> pb.VersionStatus:
        (status,) = [one for one in self.admin.versions().versions if one.version == number]
        return status

    def state(self, number: int) -> str:
        return pb.VersionState.Name(self.status(number).state).removeprefix("VERSION_STATE_")

    def await_serving(self, number: int) -> None:
        wait_until(lambda: self.state(number) == "SERVING")

    def answering(self, version: int | None = None, label: str | None = None) -> int:
        """Returns the version that answers a request; the answer names its digest."""
        started = next(iter(self.client.generate("x", version=version, label=label, max_tokens=1)))
        assert isinstance(started, pb.Started)
        assert started.model_digest == self.server.registry.version(started.model_version).digest
        return started.model_version

    @contextmanager
    def stream(self, version: int | None = None) -> Iterator[None]:
        """Runs a stream inside the block."""
        with self.client.generate("x", version=version, max_tokens=16000, ignore_eos=True) as stream:
            assert isinstance(next(iter(stream)), pb.Started)
            yield

    def end(self) -> None:
        self.admin.close()
        self.client.close()
        assert self.server.end() == 0, self.server.lines
        log = "".join(self.server.lines)
        assert "Traceback" not in log, log
        assert TOKEN not in log
