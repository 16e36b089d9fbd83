"""No secret leaves its file: a whole run with planted ones, and a search in all that others may read."""

import base64
import itertools
import os
import secrets
import ssl
import subprocess
import sys
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from deploy.ports import free_ports
from deploy.stack import Stack
from inference_service.client import AdminClient, Credentials, InferenceClient
from shared.errors import GptloopError
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.training.v1 import training_pb2
from shared.service.settings import Directories
from tests.certificates import Authority, Installed
from tests.end_to_end.conftest import TINY, share_kernels
from tests.groq_service import KEY, GroqService
from tests.redis_process import PASSWORD, RedisServer
from tests.token_files import write_tokens
from tests.waiting import HANG_S, wait_until
from trainer_service.client import TrainerClient
from trainer_service.jobs.requests import StoriesRequest, TrainRequest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
# Stands in all places that are searched, so that an empty one is noticed.
RUN = "a-run-with-secrets"
SHORT = TINY | {"max_steps": "20", "evaluation_interval": "10"}


def content(client: Any) -> bytes:
    """Returns every key and value in Redis, also as they were before RQ compressed them."""
    found: list[bytes] = []
    for key in client.scan_iter():
        found.append(key)
        match client.type(key):
            case b"string":
                found.append(client.get(key))
            case b"hash":
                found += itertools.chain(*client.hgetall(key).items())
            case b"list":
                found += client.lrange(key, 0, -1)
            case b"set":
                found += client.smembers(key)
            case b"zset":
                found += client.zrange(key, 0, -1)
            case b"stream":
                for _, fields in client.xrange(key):
                    found += itertools.chain(*fields.items())
            case other:
                raise AssertionError(f"{key!r} has the type {other!r}, which this test cannot read.")
    for value in found.copy():
        with suppress(zlib.error):
            found.append(zlib.decompress(value))
    return b"\n".join(found)


class Planted:
    """The secrets of a run, and the files that have them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.client, self.new_client, self.operator, self.wrong, self.broken = (secrets.token_hex(16) for _ in range(5))
        self.refused_groq_key = f"gsk_{secrets.token_hex(20)}"
        self.clients = write_tokens(folder / "clients", f"alice {self.client}")
        self.operators = write_tokens(folder / "operators", f"olga {self.operator}")
        self.own = folder / "own"
        self.own.write_text(f"olga {self.operator}\n")
        self.groq_key = folder / "groq"
        self.groq_key.write_text(KEY)
        self.redis_password = folder / "redis"
        self.redis_password.write_text(PASSWORD)
        self.authority = Authority(folder / "authority")
        self.tls = Installed(folder / "tls", self.authority.issue("localhost", "127.0.0.1"))
        self.keys = [self.tls.pair.key.read_text()]

    def rotate(self) -> None:
        """Replaces what a service reads again by something that it can use, and by something that it cannot."""
        pair = self.authority.issue("localhost", "127.0.0.1")
        self.keys.append(pair.key.read_text())
        self.tls.replace(pair)
        write_tokens(self.clients, f"alice {self.client}", f"alice {self.new_client}")

    def break_files(self) -> None:
        key = self.authority.issue("localhost").key
        self.keys.append(key.read_text())
        self.tls.pair.key.write_bytes(key.read_bytes())
        write_tokens(self.clients, f"alice {self.client}", self.broken, f"bob {self.broken} {self.broken}")

    def named(self) -> Iterator[tuple[str, bytes]]:
        """Yields each secret with its name: plain, as a URL has it, and as base64."""
        values = {
            "a client's token": self.client,
            "a client's new token": self.new_client,
            "an operator's token": self.operator,
            "a wrong token": self.wrong,
            "a token in a broken file": self.broken,
            "the password of Redis": PASSWORD,
            "the key of Groq": KEY,
            "a refused key of Groq": self.refused_groq_key,
        }
        for number, key in enumerate(self.keys):
            for line in key.splitlines():
                if len(line) > 20 and "-----" not in line:
                    values[f"the key {number} of TLS, line {line[:2]}…"] = line
        for name, value in values.items():
            yield name, value.encode()
            yield f"{name} in a URL", quote(value).encode()
            # Without the last signs, which depend on what follows.
            yield f"{name} as base64", base64.b64encode(value.encode()).rstrip(b"=")[:-1]


class Places:
    """All that people other than the owner of the processes may read."""

    def __init__(self) -> None:
        self._found: defaultdict[str, bytearray] = defaultdict(bytearray)

    def add(self, place: str, content: bytes | str) -> None:
        self._found[place] += (content if isinstance(content, bytes) else content.encode()) + b"\n"

    def leaks(self, planted: Planted) -> list[str]:
        """Returns which secret stands where."""
        return [
            f"{name} in {place}"
            for name, secret in planted.named()
            for place, content in self._found.items()
            if secret in content
        ]

    def has(self, place: str, word: str) -> bool:
        return word.encode() in self._found[place]

    def error_of(self, call: Callable[[], object]) -> str:
        """Adds the text of the error that a call raises, and returns it."""
        with pytest.raises(GptloopError) as raised:
            call()
        self.add("errors", f"{raised.value!r} {raised.value}")
        return str(raised.value)


def listed_processes() -> bytes:
    """Returns the command lines of all processes of the machine."""
    return subprocess.run(["ps", "-axww", "-o", "args="], capture_output=True, check=True).stdout


@contextmanager
def watching_processes(places: Places) -> Iterator[None]:
    """Adds the command lines of all processes of the machine, again and again, inside the block."""
    ended = threading.Event()
    seen: set[bytes] = set()

    def look() -> None:
        while True:
            seen.update(listed_processes().splitlines())
            if ended.wait(0.1):
                return

    watcher = threading.Thread(target=look, name="ps")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        places.add("ps", b"\n".join(seen))


class Run:
    """Everything that runs, with every secret that there can be."""

    def __init__(
        self, directories: Directories, planted: Planted, places: Places, redis: RedisServer, settings: dict[str, str]
    ) -> None:
        self.planted, self.ports, self.directories = planted, (ports := free_ports()), directories
        self.places, self.redis = places, redis
        self.environment = settings | ports.to_environment() | {"GPTLOOP_VAR": str(directories.var)}
        self.stack = Stack(directories, ports, settings, worker_stop_s=20)

    def credentials(self, token: str) -> Credentials:
        return Credentials(ca=self.planted.authority.file, token=token)

    def trainer(self, token: str) -> TrainerClient:
        return TrainerClient(f"127.0.0.1:{self.ports.trainer}", credentials=self.credentials(token))

    def inference(self, token: str) -> InferenceClient:
        return InferenceClient(f"127.0.0.1:{self.ports.inference}", credentials=self.credentials(token))

    def admin(self, token: str) -> AdminClient:
        return AdminClient(f"127.0.0.1:{self.ports.inference}", self.credentials(token))

    def command(self, *arguments: str, **settings: str) -> int:
        """Runs a command of gptloop, adds its output to the places, and returns its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", *arguments],
            cwd=PROJECT,
            env=self.environment | settings,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        self.places.add("commands", done.stdout + done.stderr)
        return done.returncode

    def ask(self, method: str, path: str, token: str, **more: Any) -> int:
        """Sends a request over HTTP, adds its answer to the places, and returns its status."""
        answer = httpx.request(
            method,
            f"https://127.0.0.1:{self.ports.inference_http}/{path}",
            headers={"authorization": f"Bearer {token}"},
            verify=ssl.create_default_context(cafile=self.planted.authority.file),
            timeout=HANG_S,
            **more,
        )
        self.places.add("answers over HTTP", f"{answer.headers} {answer.text}")
        return answer.status_code

    def end_job(self, job: str) -> int:
        with self.trainer(self.planted.operator) as trainer:
            for event in trainer.watch(job, timeout_s=HANG_S):
                self.places.add("events", str(event))
            return int(trainer.job(job).state)

    def gather(self) -> None:
        """Adds the files of all state, what is in Redis, and the metrics."""
        for path in self.directories.var.rglob("*"):
            # The cache is that of all tests.
            if path.is_file() and self.directories.cache not in path.parents:
                place = path.relative_to(self.directories.var).parts[0]
                self.places.add(f"files in {place}", f"{path}\n".encode() + path.read_bytes())
        self.places.add("values in Redis", content(self.redis.admin()))
        for port in (self.ports.trainer_metrics, self.ports.inference_metrics):
            self.places.add("metrics", httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S).content)


@pytest.fixture
def groq() -> Iterator[GroqService]:
    with GroqService().running() as service:
        yield service


@contextmanager
def running(folder: Path, groq: GroqService, planted: Planted, places: Places) -> Iterator[Run]:
    """Runs everything inside the block; adds the logs to the places at the end."""
    directories = Directories(folder / "var")
    directories.var.mkdir()
    share_kernels(directories)
    (folder / "redis").mkdir()
    redis = RedisServer(folder / "redis", free_ports().trainer)
    settings = {
        **{name: value for name, value in (os.environ | groq.environment).items() if name != "GROQ_API_KEY"},
        **planted.tls.environment,
        "GPTLOOP_LOG_LEVEL": "debug",
        "GPTLOOP_GROQ_KEY_FILE": str(planted.groq_key),
        "REDIS_URL": f"redis://gptloop@127.0.0.1:{redis.port}/0",
        "GPTLOOP_REDIS_PASSWORD_FILE": str(planted.redis_password),
        "GPTLOOP_CLIENT_TOKENS": str(planted.clients),
        "GPTLOOP_OPERATOR_TOKENS": str(planted.operators),
        "GPTLOOP_TLS_CA": str(planted.authority.file),
        "GPTLOOP_TOKEN_FILE": str(planted.own),
    }
    run = Run(directories, planted, places, redis, settings)
    try:
        places.add("commands", run.stack.up(lambda line: places.add("commands", line)))
        yield run
    finally:
        run.stack.down()
        redis.end()
    for path in directories.log.iterdir():
        places.add("files in log", path.read_bytes())


def use(system: Run) -> str:
    """Does what people do with a system, and returns a job."""
    planted = system.planted
    with system.trainer(planted.operator) as trainer:
        job = trainer.submit(TrainRequest(overrides=SHORT, name=RUN)).job.id
        stories = trainer.submit(StoriesRequest(name="tales", count=2, max_cost_usd=1.0)).job.id
    assert system.end_job(job) == training_pb2.JOB_STATE_FINISHED
    assert system.end_job(stories) == training_pb2.JOB_STATE_FINISHED
    with system.admin(planted.operator) as admin:
        wait_until(lambda: any(each.state == pb.VERSION_STATE_SERVING for each in admin.versions().versions))
        admin.promote(1)
    with system.inference(planted.client) as client:
        assert client.complete("Once", max_tokens=5).version >= 1
    body = {"prompt": "Once", "max_tokens": 5}
    assert system.ask("POST", "v1/completions", planted.client, json=body) == 200
    assert system.ask("POST", "api/policy", planted.operator, json={"label": "best"}) == 200
    for command in ("jobs", "runs", "checkpoints"):
        assert system.command(command) == 0
    assert system.command("versions") == 0
    assert system.command("generate", "--prompt", "Once", "--max-tokens", "5") == 0
    assert system.command("status") == 0
    return job


def misuse(system: Run, job: str) -> None:
    """Makes every error that may name a secret, and replaces secrets by others, good and bad."""
    planted, places, redis = system.planted, system.places, system.redis
    for refused in (planted.wrong, f"{planted.client}!"):
        with system.inference(refused) as client, system.admin(refused) as admin, system.trainer(refused) as trainer:
            for call in (lambda: client.complete("Once"), admin.versions, lambda: trainer.job(job)):
                assert "has the wrong bearer token" in places.error_of(call)
    with system.admin(planted.client) as admin, system.trainer(planted.client) as trainer:
        for call in (admin.versions, lambda: trainer.job(job)):
            assert "but has that of a client" in places.error_of(call)
    assert system.ask("POST", "v1/completions", planted.wrong, json={"prompt": "x"}) == 401
    assert system.ask("GET", f"v1/models?token={planted.client}", planted.wrong) == 401
    assert system.ask("POST", "api/rollback", planted.client, json={}) == 403
    assert system.ask("GET", "v1/models/none", planted.client) == 404
    planted.rotate()
    with system.inference(planted.new_client) as client:
        assert client.model().version >= 1
    planted.break_files()
    with system.inference(planted.client) as client:
        assert client.model().version >= 1
    planted.groq_key.write_text(planted.refused_groq_key)
    with system.trainer(planted.operator) as trainer:
        stories = trainer.submit(StoriesRequest(name="more", count=2, max_cost_usd=1.0)).job.id
    assert system.end_job(stories) == training_pb2.JOB_STATE_FAILED
    own = quote(PASSWORD)
    for url, is_valid in (
        (f"redis://gptloop:{own}@127.0.0.1:{redis.port}/0", True),
        (f"redis://gptloop:{own}@127.0.0.1:99999/0", False),
        (f"redis://gptloop:{own}@127.0.0.1:{redis.port}/x", False),
        (f"redis://gptloop:{own}!@127.0.0.1:{redis.port}/0", False),
        (f"redis://other:{own}@127.0.0.1:{redis.port}/0", False),
        (f"http://gptloop:{own}@127.0.0.1:{redis.port}/0", False),
        (f"redis://gptloop:{own}@127.0.0.1:1/0", False),
    ):
        code = system.command("status", REDIS_URL=url, GPTLOOP_REDIS_PASSWORD_FILE="")
        assert (code == 0) is is_valid, url.replace(own, "…")


def lose_redis(system: Run, job: str) -> None:
    """Lets every process report that Redis is gone, and starts it again."""
    system.redis.kill()
    with system.trainer(system.planted.operator) as trainer:
        assert "Redis does not answer" in system.places.error_of(lambda: trainer.job(job))
    assert system.command("status") != 0
    system.redis.start()


def test_no_secret_is_found_anywhere_after_a_whole_run(tmp_path: Path, groq: GroqService) -> None:
    planted, places = Planted(tmp_path / "secrets"), Places()
    with watching_processes(places), running(tmp_path, groq, planted, places) as system:
        job = use(system)
        misuse(system, job)
        system.gather()
        lose_redis(system, job)

    assert not places.leaks(planted)
    for place in ("files in registry", "values in Redis", "metrics", "commands"):
        assert places.has(place, RUN), place
    assert places.has("files in data", "There was a word.") and places.has("events", "JOB_STATE_FAILED")
    assert places.has("files in log", "caller=olga") and places.has("files in log", "caller=alice")
    assert places.has("files in log", "The tokens that were read before remain")
    assert places.has("ps", "trainer_service.job_process") and places.has("ps", "redis-server")
    assert places.has("answers over HTTP", "the wrong bearer token")


def test_a_planted_secret_is_found(tmp_path: Path) -> None:
    planted, places = Planted(tmp_path / "secrets"), Places()
    places.add("a log", f"url=redis://:{PASSWORD}@host key={planted.keys[0]}")
    places.add("a header", base64.b64encode(f"x{planted.client}".encode()[1:]))
    sleeper = subprocess.Popen([sys.executable, "-c", "input()", planted.operator], stdin=subprocess.PIPE)
    wait_until(lambda: planted.operator.encode() in listed_processes())
    with watching_processes(places):
        pass
    sleeper.communicate(b"\n")
    found = "\n".join(places.leaks(planted))
    assert "an operator's token in ps" in found
    assert "the password of Redis in a log" in found
    assert "the key 0 of TLS, line" in found
    assert "a client's token as base64 in a header" in found
