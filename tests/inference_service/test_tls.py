"""The inference server with TLS, as its clients see it: gRPC, HTTP, OpenAI's client and the commands."""

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import APIConnectionError, DefaultHttpxClient, OpenAI

from inference_service.__main__ import app
from inference_service.client import AdminClient, AsyncInferenceClient, Credentials, InferenceClient
from shared.errors import FailedPrecondition, GptloopError, Unavailable
from shared.service import cli
from tests.asynchronous import async_test
from tests.certificates import Authority, Installed, Pair
from tests.fakes import publish_tiny_version
from tests.inference_service.process import BREAKABLE, ROOT, Server, text_of
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

HOST = "127.0.0.1"


class Secured:
    """A server with a version, whose clients need a certificate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers, self.clients = Authority(folder / "servers"), Authority(folder / "clients")
        self.installed = Installed(folder / "server", self.servers.issue(HOST), self.clients.file)
        self.client = self.clients.issue("client")
        self.credentials = Credentials(self.servers.file, self.client.certificate, self.client.key)
        self.server = Server(
            folder / "var",
            BREAKABLE,
            GPTLOOP_INFERENCE_STUCK_AFTER_S="3600",
            GRPC_VERBOSITY="NONE",
            **self.installed.environment,
        )
        self.server.credentials = self.credentials
        publish_tiny_version(self.server.registry, 1.0)
        wait_until(self.server.serves)

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a command."""
        return {
            "GPTLOOP_TLS_CA": str(self.servers.file),
            "GPTLOOP_TLS_CLIENT_CERT": str(self.client.certificate),
            "GPTLOOP_TLS_CLIENT_KEY": str(self.client.key),
        }

    def http(self, authority: Authority, pair: Pair) -> httpx.Client:
        return httpx.Client(base_url=self.server.page_url, verify=_context(authority, pair), timeout=HANG_S)

    def openai(self, pair: Pair | None) -> OpenAI:
        client = DefaultHttpxClient(verify=_context(self.servers, pair))
        return OpenAI(base_url=f"{self.server.page_url}v1", api_key="any", http_client=client, max_retries=0)

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "inference_service", *arguments, "--address", self.server.address],
            cwd=ROOT,
            env={**os.environ, **self.environment, **settings},
            input="",
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    secured = Secured(tmp_path_factory.mktemp("tls"))
    yield secured
    assert secured.server.end() == 0
    # Neither a refused handshake nor a renewal says anything beyond the lines of the log.
    assert all(" inference " in line for line in secured.server.lines), secured.server.lines


@async_test
async def test_each_client_of_python_connects(secured: Secured) -> None:
    async with AsyncInferenceClient(secured.server.address, credentials=secured.credentials) as client:
        assert (await client.complete("x", max_tokens=2)).version == 1
        assert [event async for event in client.generate("x", max_tokens=2)]
    with secured.server.client() as client, AdminClient(secured.server.address, secured.credentials) as admin:
        assert client.complete("x", max_tokens=2).version == 1
        assert [each.version for each in admin.versions().versions] == [1]


def test_the_page_and_the_api_answer_over_https_only(secured: Secured) -> None:
    assert secured.server.page_url.startswith("https://")
    with secured.http(secured.servers, secured.client) as browser:
        assert "<title>" in browser.get("/").text
    with secured.openai(secured.client) as openai:
        assert openai.completions.create(model="best", prompt="x", max_tokens=2).usage
        chunks = list(openai.completions.create(model="best", prompt="x", max_tokens=8, stream=True))
        assert chunks[-1].choices[0].finish_reason
    with secured.openai(None) as stranger, pytest.raises(APIConnectionError):
        stranger.models.list()
    with pytest.raises(httpx.HTTPError):
        httpx.get(secured.server.page_url.replace("https", "http"), timeout=HANG_S)


def test_the_metrics_page_has_no_tls(secured: Secured) -> None:
    assert secured.server.metrics_url.startswith("http://")
    assert secured.server.metrics()


def test_a_command_reads_its_certificates_from_the_environment(secured: Secured) -> None:
    written = secured.run("generate", "--prompt", "x", "--max-tokens", "2")
    assert (written.returncode, written.stdout[:1]) == (0, "x")


def test_a_command_that_gets_no_connection_writes_one_sentence(secured: Secured) -> None:
    # Not the lines of gRPC.
    done = secured.run("versions", GPTLOOP_TLS_CA=str(secured.clients.file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: The certificate of the server at {secured.server.address} is not signed by an authority that this "
        "client trusts; set GPTLOOP_TLS_CA to the file with the server's authority.\n"
    )


def test_commands_say_which_setting_is_wrong(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = dict.fromkeys(secured.environment, "")
    for settings, part in (
        ({"GPTLOOP_TLS_SERVER_NAME": "other"}, "is for another name"),
        ({"GPTLOOP_TLS_CLIENT_CERT": "", "GPTLOOP_TLS_CLIENT_KEY": ""}, "GPTLOOP_TLS_CLIENT_CERT"),
        ({"GPTLOOP_TLS_CA": "absent.pem"}, "GPTLOOP_TLS_CA is 'absent.pem', which cannot be read"),
        (nothing, "it may use TLS"),
    ):
        with monkeypatch.context() as patched:
            for name, value in {**secured.environment, **settings}.items():
                patched.setenv(name, value)
            for command in (["versions"], ["generate", "--prompt", "x"], ["pin", "1"]):
                with pytest.raises(GptloopError, match=part):
                    cli.invoke(app, [*command, "--address", secured.server.address])


def test_renewed_files_break_no_stream_and_shut_removed_clients_out(secured: Secured) -> None:
    servers, clients = Authority(secured.folder / "new-servers"), Authority(secured.folder / "new-clients")
    newcomer = clients.issue("client")
    new = Credentials(servers.file, newcomer.certificate, newcomer.key)
    with secured.server.client() as client, secured.http(secured.servers, secured.client) as browser:
        expected = client.complete("x", max_tokens=80, seed=1, ignore_eos=True).text
        stream = client.generate("x", max_tokens=80, seed=1, ignore_eos=True)
        asked = {"model": "best", "prompt": "x", "max_tokens": 80, "seed": 1, "stream": True}
        with browser.stream("POST", "/v1/completions", json=asked) as response:
            lines = response.iter_lines()
            # Both streams have begun, and neither ends before it may.
            secured.server.order("hold")
            next(stream)
            next(lines)
            secured.installed.replace(servers.issue(HOST))
            secured.installed.trust(clients.file)
            with InferenceClient(secured.server.address, credentials=new) as other:
                assert other.model().version == 1
            with secured.http(servers, newcomer) as other_browser:
                assert other_browser.get("/v1/models").status_code == 200
            # The old authority signs neither the server nor clients any more.
            with (
                InferenceClient(secured.server.address, retries=0, credentials=_apart(secured.credentials)) as old,
                pytest.raises(FailedPrecondition, match="is not signed by an authority"),
            ):
                old.model()
            removed = Credentials(servers.file, secured.client.certificate, secured.client.key)
            with (
                InferenceClient(secured.server.address, retries=0, credentials=removed) as old,
                pytest.raises(Unavailable, match="closed the connection"),
            ):
                old.model()
            with secured.http(servers, secured.client) as old_browser, pytest.raises(httpx.HTTPError):
                old_browser.get("/v1/models")
            secured.server.order("go on")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert text_of(stream) == expected
        # Later calls of an open connection, too.
        assert client.model().version == 1
        assert browser.get("/v1/models").status_code == 200
    secured.installed.replace(secured.servers.issue(HOST))
    secured.installed.trust(secured.clients.file)
    with secured.server.client() as client:
        assert client.model().version == 1


def _context(authority: Authority, pair: Pair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.file)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def _apart(credentials: Credentials) -> Credentials:
    """Returns the same credentials, for a channel that does not share the connection of another one."""
    return Credentials(credentials.ca, credentials.certificate, credentials.key, server_name=HOST)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"GPTLOOP_TLS_CERT": "absent.pem", "GPTLOOP_TLS_KEY": "absent.key"},
            "GPTLOOP_TLS_CERT is 'absent.pem', which cannot be read: No such file or directory.",
        ),
        (
            {"GPTLOOP_INFERENCE_HOST": "0.0.0.0"},
            "GPTLOOP_INFERENCE_HOST is '0.0.0.0', which other machines can reach, but without GPTLOOP_TLS_CERT, "
            "GPTLOOP_TLS_KEY, GPTLOOP_CLIENT_TOKENS and GPTLOOP_OPERATOR_TOKENS anybody there",
        ),
    ],
)
def test_a_server_does_not_start_with_wrong_settings(tmp_path: Path, settings: dict[str, str], sentence: str) -> None:
    ports = dict.fromkeys(("PORT", "HTTP_PORT", "METRICS_PORT"), "0")
    done = subprocess.run(
        [sys.executable, "-m", "inference_service", "serve"],
        cwd=ROOT,
        env={
            **os.environ,
            **{f"GPTLOOP_INFERENCE_{name}": port for name, port in ports.items()},
            "GPTLOOP_VAR": str(tmp_path / "var"),
            **settings,
        },
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}"), done.stderr
    assert done.stderr.count("\n") == 1
