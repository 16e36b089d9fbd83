"""Odd connections and odd files of TLS and tokens under a live server whose good clients must be answered."""

import contextlib
import random
import shutil
import socket
import ssl
import threading
from pathlib import Path

import httpx

from inference_service.client import InferenceClient
from shared.errors import GptloopError, Unauthenticated
from shared.service.access.credentials import Credentials
from tests.certificates import Authority, Installed, replace
from tests.fakes import publish_tiny_version
from tests.fuzzers.area import CALL_S, Area, read_lines
from tests.fuzzers.calls import garbage
from tests.inference_service.process import Server
from tests.mutations import odd_bytes
from tests.token_files import ALICE, BOB, OPERATOR, write_tokens
from tests.waiting import wait_until

_HOST = "127.0.0.1"
_KEPT = "new connections keep the certificates from before"
_RENEWED = "new connections use the certificate in"
_KEPT_TOKENS = "The tokens that were read before remain."


class SecuredTarget:
    """A live server with TLS, whose clients need a certificate and a token."""

    def __init__(self, folder: Path) -> None:
        self.servers, self.clients = Authority(folder / "servers"), Authority(folder / "clients")
        self.installed = Installed(folder / "server", self.servers.issue(_HOST), self.clients.file)
        own = self.clients.issue("client")
        self.tokens = folder / "tokens"
        write_tokens(self.tokens, f"alice {ALICE}")
        operators = write_tokens(folder / "operators", f"olga {OPERATOR}")
        self.credentials = Credentials(self.servers.file, own.certificate, own.key, token=OPERATOR)
        self.context = ssl.create_default_context(cafile=self.servers.file)
        self.context.load_cert_chain(own.certificate, own.key)
        self.strangers = Authority(folder / "strangers")
        self.server = Server(
            folder / "var",
            GRPC_VERBOSITY="NONE",
            GPTLOOP_CLIENT_TOKENS=str(self.tokens),
            GPTLOOP_OPERATOR_TOKENS=str(operators),
            **self.installed.environment,
        )
        self.server.credentials = self.credentials
        publish_tiny_version(self.server.registry, 1.0)
        wait_until(self.server.serves)
        self.ports = {
            "gRPC": int(self.server.address.rpartition(":")[2]),
            "HTTP": httpx.URL(self.server.page_url).port or 443,
        }

    def failure(self) -> str:
        """Makes a call over new connections of gRPC and HTTP; returns what failed, or nothing."""
        try:
            with self.server.client() as client:
                client.complete("Once", max_tokens=2, timeout_s=CALL_S)
            status = self.status(OPERATOR)
        except (GptloopError, httpx.HTTPError) as error:
            return repr(error)
        return "" if status == 200 else f"HTTP {status}"

    def status(self, token: str) -> int:
        """Returns the status of a request over HTTP with a token."""
        headers = {"authorization": f"Bearer {token}"}
        answer = httpx.get(f"{self.server.page_url}v1/models", verify=self.context, headers=headers, timeout=CALL_S)
        return answer.status_code

    def lets_in(self, token: str) -> bool:
        """Whether a call over gRPC with a token is let in."""
        changed = Credentials(self.credentials.ca, self.credentials.certificate, self.credentials.key, token=token)
        try:
            with InferenceClient(self.server.address, credentials=changed) as client:
                client.model()
        except Unauthenticated:
            return False
        return True

    def lines_with(self, text: str) -> int:
        """Counts the lines of the log with a text."""
        return sum(text in line for line in self.server.lines.copy())

    def new_lines_with(self, text: str, before: int) -> int:
        """Counts the lines with a text after the first ones; waits for one, because the log may arrive late."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.lines_with(text) > before, hang_s=CALL_S)
        return self.lines_with(text) - before


class GoodClients:
    """Calls all the time, over new connections, while odd inputs arrive; keeps what failed."""

    def __init__(self, target: SecuredTarget, area: Area) -> None:
        self._target, self._area = target, area
        self._ended = threading.Event()
        self.calls = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            if failed := self._target.failure():
                self._area.fell("a good client over TLS is not answered meanwhile", failed)
            self.calls += 1

    def __enter__(self) -> "GoodClients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def _hello(context: ssl.SSLContext) -> bytes:
    """Returns the first message of a client."""
    out = ssl.MemoryBIO()
    line = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=_HOST)
    with contextlib.suppress(ssl.SSLWantReadError):
        line.do_handshake()
    return out.read()


def try_handshake(rng: random.Random, area: Area, target: SecuredTarget, kept: list[socket.socket]) -> None:
    """Connects to a port with TLS in a wrong way: with garbage, half a handshake, plain text, or an early end."""
    name = rng.choice(list(target.ports))
    how = rng.choice(
        ("plain text", "half a handshake", "changed handshake", "early end", "garbage inside", "no certificate")
    )
    area.tried(f"{name}, {how}")
    with contextlib.suppress(OSError):
        line = socket.create_connection((_HOST, target.ports[name]), timeout=CALL_S)
        hello = _hello(target.context)
        match how:
            case "plain text":
                line.sendall(garbage(rng))
            case "half a handshake":
                line.sendall(hello[: rng.randrange(len(hello))])
            case "changed handshake":
                line.sendall(odd_bytes(rng, hello))
            case "early end":
                line.sendall(hello)
                line.recv(rng.randrange(1, 2000))
            case "garbage inside" | "no certificate":
                context = target.context
                if how == "no certificate":
                    context = ssl.create_default_context(cafile=target.servers.file)
                context.set_alpn_protocols(["h2"] if name == "gRPC" else ["http/1.1"])
                line = context.wrap_socket(line, server_hostname=_HOST)
                line.sendall(garbage(rng))
        if rng.random() < 0.3:
            kept.append(line)
            if len(kept) > 60:
                kept.pop(0).close()
        else:
            if rng.random() < 0.5:
                # The connection ends by a reset.
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            line.close()


def _is_usable(target: SecuredTarget) -> bool:
    """Whether Python can use the files, by themselves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(target.installed.pair.certificate, target.installed.pair.key, password="")
        context.load_verify_locations(target.installed.client_ca)
    except (OSError, ValueError):
        return False
    return True


def try_pem(rng: random.Random, area: Area, target: SecuredTarget) -> None:
    """Changes a PEM file of the live server; new connections must have what was there before."""
    pair, authority = target.installed.pair, target.installed.client_ca
    assert authority is not None
    kind, path = rng.choice(
        (("certificate", pair.certificate), ("key", pair.key), ("authority of the clients", authority))
    )
    before = path.read_bytes()
    kept, renewed = target.lines_with(_KEPT), target.lines_with(_RENEWED)
    area.tried(kind)
    match rng.randrange(8):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            other = target.strangers.issue(_HOST)
            replace(
                path, (other.key if kind == "certificate" else other.certificate).read_bytes()[: rng.choice((40, 9999))]
            )
        case _:
            replace(path, odd_bytes(rng, before))
    usable = _is_usable(target)
    # Certificates that can be used, but that their clients refuse, are the business of who installed them.
    for _ in range(2):
        if (failed := target.failure()) and not usable:
            area.fell(f"a {kind} that cannot be used locks good clients out: {failed[:80]}", path)
    # A connection may begin when the file is gone, and the folder is not yet there.
    most = 2 if path.is_dir() else 1
    if not usable and not 1 <= (lines := target.new_lines_with(_KEPT, kept)) <= most:
        given = path.read_bytes() if path.is_file() else ""
        area.fell(f"{lines} lines in the log about a {kind}, not one", (target.server.lines[-3:], given))
    if path.is_dir():
        path.rmdir()
    replace(path, before)
    if failed := target.failure():
        area.fell(f"good clients are not answered after the {kind} is back", failed)
    if not usable and target.new_lines_with(_RENEWED, renewed) != 1:
        area.fell("the log does not say once that the files can be used again", target.server.lines[-3:])


def _tokens_in(content: bytes) -> set[bytes]:
    """Returns everything in a file that may be a token."""
    return {words[1] for line in content.split(b"\n") if len(words := line.split()) == 2}


def try_live_tokens(rng: random.Random, area: Area, target: SecuredTarget) -> None:
    """Changes the file of tokens of a live server; no token may be taken that no file had."""
    before = b"# people\nalice " + ALICE.encode() + b"\nbob " + BOB.encode() + b"\n"
    lines = target.lines_with("GPTLOOP_CLIENT_TOKENS")
    replace(target.tokens, before)
    target.lets_in(ALICE)
    area.tried()
    lines += target.new_lines_with("GPTLOOP_CLIENT_TOKENS", lines)
    kept = target.lines_with(_KEPT_TOKENS)
    after = odd_bytes(rng, before)
    is_directory = rng.random() < 0.1
    if is_directory:
        target.tokens.unlink()
        target.tokens.mkdir()
        after = b""
    else:
        replace(target.tokens, after)
    remain = target.lets_in(ALICE)
    count = target.new_lines_with("GPTLOOP_CLIENT_TOKENS", lines)
    is_kept = target.lines_with(_KEPT_TOKENS) > kept
    known = _tokens_in(after) | (_tokens_in(before) if is_kept else set())
    if is_kept and not remain:
        area.fell("a file of tokens that cannot be used removes the old ones", after)
    if remain and ALICE.encode() not in known:
        area.fell("a removed token is taken", after)
    if count != 1:
        area.fell(f"{count} lines in the log about a file of tokens, not one", (after, target.server.lines[-3:]))
    wrong = odd_bytes(rng, rng.choice((ALICE, BOB, "alice")).encode())[:500].decode("ascii", "replace").strip()
    can_be_sent = wrong and wrong.isascii() and wrong.isprintable()
    if can_be_sent and target.status(wrong) == 200 and wrong.encode() not in known | {OPERATOR.encode()}:
        area.fell("a wrong token is taken", (wrong, after))
    if is_directory:
        shutil.rmtree(target.tokens)


def read_log(area: Area, target: SecuredTarget) -> None:
    """Keeps what the server's log says of a mistake, and whether it answers good clients."""
    if target.server.process.poll() is not None:
        area.fell("the server ended", target.server.lines[-40:])
    elif failed := target.failure():
        area.fell("a good client over TLS is not answered afterwards", failed)
    read_lines(area, target.server.lines.copy())
