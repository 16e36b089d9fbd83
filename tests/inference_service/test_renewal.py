"""Two servers behind one address of a client, with TLS and tokens, while operators replace all that can be replaced."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from inference_service.client import AsyncInferenceClient, Credentials, InferenceClient
from shared.errors import FailedPrecondition, Unauthenticated
from tests.asynchronous import async_test
from tests.certificates import Authority, Installed, replace
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server
from tests.waiting import eventually, wait_until

pytestmark = pytest.mark.slow

HOST = "127.0.0.1"
STREAMS = 64
OLD, NEW = "the-token-from-before", "the-token-from-now-on"


class Load:
    """Keeps 64 streams running, each with the safe retries of the client, and counts those that ended well."""

    def __init__(self, client: AsyncInferenceClient) -> None:
        self.ended = 0
        self._client = client
        self._stops = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(self._stream())
            try:
                yield self
            finally:
                self._stops = True

    async def _stream(self) -> None:
        while not self._stops:
            (sample,) = (await self._client.complete("x", max_tokens=30, ignore_eos=True)).samples
            assert sample.generated_tokens == 30
            self.ended += 1

    async def goes_on(self) -> None:
        """Waits for streams that began and ended after this call."""
        enough = self.ended + 2 * STREAMS
        await eventually(lambda: self.ended >= enough)


class Replica:
    """A server that comes back on the same port with the same settings."""

    def __init__(self, folder: Path, settings: dict[str, str], credentials: Credentials) -> None:
        self._folder, self._settings, self._credentials = folder, settings, credentials
        self._starts = 0
        self.server = self._start(0)

    def _start(self, port: int) -> Server:
        self._starts += 1
        var = self._folder / str(self._starts)
        server = Server(var, GPTLOOP_INFERENCE_PORT=str(port), GRPC_VERBOSITY="NONE", **self._settings)
        server.credentials = self._credentials
        publish_tiny_version(server.registry, 1.0)
        return server

    def restart(self) -> None:
        assert self.server.end() == 0, self.server.lines
        self.server = self._start(int(self.server.address.rpartition(":")[2]))

    def answers(self) -> bool:
        return self.server.metrics()["gptloop_inference_requests_total", "length"] > STREAMS


@async_test
async def test_nobody_notices_that_a_replica_is_replaced_and_certificates_and_tokens_are_renewed(
    tmp_path: Path,
) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    installed = Installed(tmp_path / "server", old.issue(HOST))
    tokens = replace(tmp_path / "tokens", f"loader {OLD}\n".encode())
    # Clients trust both authorities while the servers change from one to the other.
    both = replace(tmp_path / "both.pem", old.file.read_bytes() + new.file.read_bytes())
    settings = {**installed.environment, "GPTLOOP_CLIENT_TOKENS": str(tokens), "GPTLOOP_OPERATOR_TOKENS": str(tokens)}
    replicas = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        replicas.append(Replica(tmp_path / name, settings, Credentials(both)))
    try:
        for replica in replicas:
            wait_until(replica.server.serves)
        address = ",".join(replica.server.address for replica in replicas)
        before, after = (
            Credentials(both, server_name=HOST, token=OLD),
            Credentials(new.file, server_name=HOST, token=NEW),
        )
        async with (
            AsyncInferenceClient(address, credentials=before) as client,
            Load(client).running() as load,
        ):
            await load.goes_on()
            # Both tokens are good for a while, and the certificate comes from another authority.
            replace(tokens, f"loader {OLD}\nloader {NEW}\n".encode())
            installed.replace(new.issue(HOST))
            await load.goes_on()
            await asyncio.to_thread(replicas[0].restart)
            await load.goes_on()
            async with asyncio.TaskGroup() as group:
                for replica in replicas:
                    group.create_task(asyncio.to_thread(wait_until, replica.answers))
        async with AsyncInferenceClient(address, credentials=after) as client, Load(client).running() as load:
            await load.goes_on()
            replace(tokens, f"loader {NEW}\n".encode())
            await load.goes_on()
        with InferenceClient(replicas[1].server.address, credentials=before) as left, pytest.raises(Unauthenticated):
            left.model()
        stale = Credentials(old.file, token=NEW)
        with (
            InferenceClient(replicas[1].server.address, retries=0, credentials=stale) as left,
            pytest.raises(FailedPrecondition, match="is not signed by an authority"),
        ):
            left.model()
    finally:
        codes = [replica.server.end() for replica in replicas]
    assert codes == [0, 0]
