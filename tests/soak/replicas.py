"""Drains and restarts two replicas in turn while clients stream from both, through TLS and with tokens.

The clients reach the replicas through Envoy first, and then choose between them by themselves. Now and then the
certificate and the token are replaced by new ones.

`python -m tests.soak.replicas --streams 64 --restarts 40 --rotations 8`
"""

import asyncio
import shutil
import ssl
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from inference_service.client import AsyncInferenceClient
from shared.errors import FailedPrecondition, GptloopError, Unauthenticated, Unavailable
from shared.gpt.config import GPTConfig
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.registry.registry import Registry
from shared.service import cli
from shared.service.access.credentials import Credentials
from shared.service.listening import free_port_numbers
from shared.service.lists import print_rows
from tests.certificates import Authority, Installed, replace
from tests.envoy_process import MISSING, PROGRAM, Envoy
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server
from tests.token_files import OPERATOR, write_tokens
from tests.waiting import HANG_S

# Four layers as wide as tinystories-53m; its tokens are bytes.
MODEL = GPTConfig(4, 384, 8, 1536, 512, vocabulary_size=257, tied_head=False)
PROMPT = "Once upon a time there was a little dog"
SEEDS = 8
# The name in the certificate of every replica and of Envoy.
NAME = "inference"
_POLL_S = 0.05

Tokens = tuple[int, ...]


class Secrets:
    """The files of certificates and tokens that all processes read, and what clients show."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tls"
        self._authority = Authority(folder / "authority")
        self.pair = self._authority.issue(NAME)
        self._installed = Installed(self.folder, self.pair)
        replace(self.folder / "ca.crt", self._authority.file.read_bytes())
        self._clients = folder / "clients"
        self._operators = write_tokens(folder / "operators", f"olga {OPERATOR}")
        self._made = 0
        self.write_tokens(self.new_token())

    def renew_certificate(self) -> None:
        """Installs another certificate with its key."""
        self.pair = self._authority.issue(NAME)
        self._installed.replace(self.pair)

    def new_token(self) -> str:
        """Makes a token that no file has yet."""
        self._made += 1
        return f"a-token-that-nobody-guesses-{self._made}"

    def write_tokens(self, *tokens: str) -> None:
        """Writes which tokens clients may show; the last one is theirs."""
        write_tokens(self._clients, *(f"alice {token}" for token in tokens))
        self.token = tokens[-1]

    def are_presented_on(self, port: int) -> bool:
        """Returns whether new connections to a port get the newest certificate."""
        found = ssl.get_server_certificate(("127.0.0.1", port), timeout=HANG_S)
        return ssl.PEM_cert_to_DER_cert(found) == ssl.PEM_cert_to_DER_cert(self.pair.certificate.read_text())

    def credentials(self, token: str | None = None) -> Credentials:
        """Returns what a client shows: by default the newest token."""
        return Credentials(ca=self._authority.file, server_name=NAME, token=token or self.token)

    def settings(self) -> dict[str, str]:
        """Returns the environment of a server."""
        files = {"GPTLOOP_CLIENT_TOKENS": str(self._clients), "GPTLOOP_OPERATOR_TOKENS": str(self._operators)}
        return self._installed.environment | files


class Replicas:
    """Two servers on one registry, each on a port that it keeps."""

    def __init__(self, folder: Path, secrets: Secrets, slots: int) -> None:
        self.ports = free_port_numbers(2)
        self.logs: list[str] = []
        self._var = folder / "var"
        self._secrets = secrets
        self._slots = slots
        self.servers = [self._start(port) for port in self.ports]

    @property
    def registry(self) -> Registry:
        """The registry of both."""
        return self.servers[0].registry

    def _start(self, port: int) -> Server:
        settings = self._secrets.settings() | {
            "GPTLOOP_INFERENCE_PORT": str(port),
            "GPTLOOP_INFERENCE_SLOTS": str(self._slots),
        }
        return Server(self._var, **settings)

    def restart(self, number: int) -> None:
        """Drains a replica and starts it again."""
        self._end(number)
        self.servers[number] = self._start(self.ports[number])

    def _end(self, number: int) -> None:
        server = self.servers[number]
        code = server.end()
        log = "".join(server.lines)
        self.logs.append(log)
        if code != 0 or "Traceback" in log:
            raise FailedPrecondition(f"A replica ended with {code}.")

    def answered(self, number: int) -> int:
        """Returns how many streams a replica has answered to their end since its start."""
        return int(self.servers[number].metrics()["gptloop_inference_requests_total", "length"])

    def end(self) -> None:
        """Stops both."""
        for number in range(len(self.servers)):
            self._end(number)


@dataclass
class Phase:
    """What happened while clients reached the replicas in one way."""

    name: str
    address: str
    seconds: float = 0.0
    streams: int = 0
    tokens: int = 0
    restarts: int = 0
    rotations: int = 0
    # Streams that each replica answered.
    answered: Counter[int] = field(default_factory=Counter)
    proxy_retries: int | None = None


class Load:
    """Clients that stream all the time, and what is done to the replicas meanwhile."""

    def __init__(self, replicas: Replicas, secrets: Secrets, streams: int, tokens: int) -> None:
        self._replicas = replicas
        self._secrets = secrets
        self._streams = streams
        self._tokens = tokens
        self._expected: dict[int, Tokens] = {}
        self._phase = Phase("", "")
        self._stopping = False
        # The token with which each client ended its last stream.
        self._shown: dict[int, str] = {}
        self.phases: list[Phase] = []
        self.violations: list[str] = []

    async def prepare(self) -> None:
        """Waits for both replicas, and records the stream of each seed."""
        for port in self._replicas.ports:
            await self._until_answers(port)
        async with self._client(f"127.0.0.1:{self._replicas.ports[0]}") as client:
            self._expected = {seed: await self._read(client, seed) for seed in range(SEEDS)}

    async def run(self, name: str, address: str, restarts: int, rotations: int) -> Phase:
        """Restarts the replicas in turn, with the rotations evenly between, while all clients use one address."""
        begin, phase = time.monotonic(), Phase(name, address)
        self._phase, self._stopping = phase, False
        self._shown.clear()
        phase.answered.subtract({number: self._replicas.answered(number) for number in range(2)})
        readers = [asyncio.create_task(self._keep_reading(number)) for number in range(self._streams)]
        try:
            for number in range(restarts):
                await self._restart(number % 2)
                while phase.rotations * restarts < rotations * (number + 1):
                    await self._rotate()
                print(f"{name}: {number + 1} restarts, {phase.streams} streams", flush=True)
        finally:
            self._stopping = True
            await asyncio.gather(*readers)
        for number in range(2):
            phase.answered[number] += self._replicas.answered(number)
        phase.seconds = time.monotonic() - begin
        self.phases.append(phase)
        return phase

    async def _restart(self, number: int) -> None:
        self._phase.answered[number] += self._replicas.answered(number)
        await asyncio.to_thread(self._replicas.restart, number)
        await self._until_answers(self._replicas.ports[number])
        # Clients have found it again.
        await self._until(lambda: asyncio.to_thread(self._has_answered, number))
        self._phase.restarts += 1

    def _has_answered(self, number: int) -> bool:
        return self._replicas.answered(number) > 0

    async def _rotate(self) -> None:
        """Replaces the certificate, then the token; the old token works until every client shows the new one."""
        self._secrets.renew_certificate()
        for port in (*self._replicas.ports, int(self._phase.address.rpartition(":")[2])):
            await self._until(lambda port=port: asyncio.to_thread(self._secrets.are_presented_on, port))  # type: ignore[misc]
        old = self._secrets.token
        self._secrets.write_tokens(old, self._secrets.new_token())
        for port in self._replicas.ports:
            await self._until_answers(port)
        await self._until(self._all_show_the_newest_token)
        self._secrets.write_tokens(self._secrets.token)
        for port in self._replicas.ports:
            await self._until(lambda port=port: self._refuses(port, old))  # type: ignore[misc]
        self._phase.rotations += 1

    async def _all_show_the_newest_token(self) -> bool:
        return len(self._shown) == self._streams and set(self._shown.values()) == {self._secrets.token}

    async def _refuses(self, port: int, token: str) -> bool:
        async with self._client(f"127.0.0.1:{port}", token) as client:
            try:
                await client.model()
            except Unauthenticated:
                return True
            return False

    async def _until_answers(self, port: int) -> None:
        async def answers() -> bool:
            async with self._client(f"127.0.0.1:{port}") as client:
                with suppress(Unavailable, Unauthenticated, FailedPrecondition):
                    await client.model()
                    return True
                return False

        await self._until(answers)

    async def _until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(HANG_S):
            while not await condition():
                if self.violations:
                    raise FailedPrecondition(self.violations[0])
                await asyncio.sleep(_POLL_S)

    def _client(self, address: str, token: str | None = None) -> AsyncInferenceClient:
        return AsyncInferenceClient(address, credentials=self._secrets.credentials(token))

    async def _keep_reading(self, number: int) -> None:
        """Streams again and again with one client, and makes another one when there is another token."""
        seed = number % SEEDS
        while not self._stopping:
            token = self._secrets.token
            async with self._client(self._phase.address, token) as client:
                while not self._stopping and token == self._secrets.token:
                    try:
                        answer = await self._read(client, seed)
                    except (GptloopError, OSError) as error:
                        self.violations.append(f"{self._phase.name}: a call failed: {error!r}")
                        return
                    if answer != self._expected[seed]:
                        self.violations.append(f"{self._phase.name}: a stream differed from the same stream before.")
                    self._shown[number] = token
                    self._phase.streams += 1
                    self._phase.tokens += len(answer)

    async def _read(self, client: AsyncInferenceClient, seed: int) -> Tokens:
        tokens: list[int] = []
        async with client.generate(PROMPT, seed=seed, max_tokens=self._tokens, ignore_eos=True) as stream:
            async for event in stream:
                if isinstance(event, pb.Delta):
                    tokens += event.token_ids
        return tuple(tokens)

    def check_shares(self) -> None:
        """Checks that each replica had its share in each phase."""
        for phase in self.phases:
            least, most = sorted(phase.answered[number] for number in range(2))
            if least * 3 < most:
                self.violations.append(f"{phase.name}: one replica answered {least} streams, the other {most}.")

    def print_summary(self) -> None:
        """Prints the figures of each phase."""
        columns = ("clients", "seconds", "streams", "tokens/s", "restarts", "rotations", "by replica", "proxy retries")
        rows = [
            (
                phase.name,
                f"{phase.seconds:.0f}",
                str(phase.streams),
                f"{phase.tokens / phase.seconds:.0f}",
                str(phase.restarts),
                str(phase.rotations),
                " + ".join(str(phase.answered[number]) for number in range(2)),
                "" if phase.proxy_retries is None else str(phase.proxy_retries),
            )
            for phase in self.phases
        ]
        print_rows(columns, rows)


async def soak(folder: Path, model: GPTConfig, streams: int, restarts: int, rotations: int, tokens: int = 64) -> Load:
    """Runs the soak on one event loop: half of everything through Envoy, half by the clients' own choice."""
    secrets = Secrets(folder / "secrets")
    replicas = Replicas(folder, secrets, slots=streams)
    load = Load(replicas, secrets, streams, tokens)
    try:
        publish_tiny_version(replicas.registry, 1.0, config=model, windows=(8, 64))
        await load.prepare()
        envoy = Envoy(folder / "envoy", secrets.folder, replicas.ports)
        try:
            phase = await load.run("behind Envoy", envoy.address, restarts - restarts // 2, rotations - rotations // 2)
            phase.proxy_retries = envoy.statistics()["upstream_rq_retry"]
        finally:
            envoy.end()
        address = ",".join(f"127.0.0.1:{port}" for port in replicas.ports)
        await load.run("round robin", address, restarts // 2, rotations // 2)
    finally:
        replicas.end()
        (folder / "log").write_text("\n".join(replicas.logs))
    return load


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def main(
    streams: Annotated[int, typer.Option(min=1, help="Streams at any time.")] = 64,
    restarts: Annotated[int, typer.Option(min=2, help="Restarts of a replica.")] = 40,
    rotations: Annotated[int, typer.Option(min=2, help="New certificates and tokens.")] = 8,
) -> None:
    if not PROGRAM.exists():
        raise FailedPrecondition(MISSING + ".")
    folder = Path(tempfile.mkdtemp(prefix="gptloop-soak-"))
    print(f"files in {folder}", flush=True)
    load = asyncio.run(soak(folder, MODEL, streams, restarts, rotations))
    load.check_shares()
    load.print_summary()
    for text in load.violations[:20]:
        print(f"violation: {text}")
    if load.violations:
        raise typer.Exit(1)
    print("No call failed, every stream was the same, and every old token was refused after its removal.")
    shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(app)
