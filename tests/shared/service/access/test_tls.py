import asyncio
import contextlib
import dataclasses
import errno
import logging
import socket
import ssl
import time
import tracemalloc
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.errors import InvalidArgument
from shared.service.access.credentials import Credentials
from shared.service.access.pem import PemFile
from shared.service.access.tls import ServerTls, TlsFiles, read_tls
from shared.service.client_channel import open_aio_channel
from shared.service.grpc_server import GrpcServer
from shared.service.listening import Address
from tests.asynchronous import async_test
from tests.certificates import Authority, Installed, replace

HOST = "127.0.0.1"


class Serving:
    """gRPC and a plain server of asyncio, with the certificates of one set of files."""

    def __init__(self, installed: Installed) -> None:
        self._tls = ServerTls(TlsFiles(installed.pair.certificate, installed.pair.key, installed.client_ca))
        self._grpc = GrpcServer([], lambda *_: None)

    @asynccontextmanager
    async def started(self) -> AsyncIterator["Serving"]:
        self.port = await self._grpc.start(Address(HOST, 0, "HOST", "PORT"), self._tls)
        await self._grpc.set_serving(True)
        plain = await asyncio.get_running_loop().create_server(Echo, HOST, 0, ssl=self._tls.context())
        self.plain_port = plain.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            plain.close()
            await self._grpc.stop(0.0, asyncio.Event())

    def channel(self, ca: Path, pair: Any = None) -> grpc.aio.Channel:
        own = {} if pair is None else {"certificate": pair.certificate, "key": pair.key}
        # Without it, a channel takes the connection of another one to the same address.
        return open_aio_channel(
            f"{HOST}:{self.port}", Credentials(ca=ca, **own), (("grpc.use_local_subchannel_pool", 1),)
        )

    async def accepts(self, ca: Path, pair: Any = None) -> set[str]:
        """Returns which of the two servers accept a new connection."""
        accepting = set()
        async with self.channel(ca, pair) as channel:
            try:
                await check(channel)
                accepting.add("grpc")
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cafile=ca)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            line = await asyncio.to_thread(Line, self.plain_port, context)
            if await asyncio.to_thread(line.answers):
                accepting.add("asyncio")
            line.close()
        return accepting


BOTH = {"grpc", "asyncio"}


class Line:
    """A connection to a server that sends everything back."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        with socket.create_connection((HOST, port)) as plain:
            self._socket = context.wrap_socket(plain, server_hostname=HOST)

    def answers(self) -> bool:
        self._socket.sendall(b"here")
        return self._socket.recv(4) == b"here"

    def close(self) -> None:
        self._socket.close()


class Echo(asyncio.Protocol):
    """Sends everything back."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


async def check(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest())).status)


def watch(channel: grpc.aio.Channel) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return aiter(stub.Watch(health_pb2.HealthCheckRequest()))


@async_test
async def test_a_renewed_certificate_serves_new_connections_and_leaves_open_ones(tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    installed = Installed(tmp_path / "server", old.issue(HOST))
    async with Serving(installed).started() as serving, serving.channel(old.file) as channel:
        line = await asyncio.to_thread(Line, serving.plain_port, ssl.create_default_context(cafile=old.file))
        stream = watch(channel)
        assert (await anext(stream)).status == health_pb2.HealthCheckResponse.SERVING
        installed.replace(new.issue(HOST))
        assert await serving.accepts(old.file) == set()
        assert await serving.accepts(new.file) == BOTH
        # The connections from before.
        assert await check(channel) == health_pb2.HealthCheckResponse.SERVING
        await serving._grpc.set_serving(False)
        assert (await anext(stream)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await asyncio.to_thread(line.answers)
        line.close()


@async_test
async def test_clients_need_a_certificate_of_the_authority_in_the_file_now(tmp_path: Path) -> None:
    servers, clients, others = (Authority(tmp_path / name) for name in ("servers", "clients", "others"))
    installed = Installed(tmp_path / "server", servers.issue(HOST), clients.file)
    client, other = clients.issue("client"), others.issue("other")
    async with Serving(installed).started() as serving, serving.channel(servers.file, client) as channel:
        assert await serving.accepts(servers.file) == set()
        assert await serving.accepts(servers.file, other) == set()
        assert await serving.accepts(servers.file, client) == BOTH
        assert await check(channel) == health_pb2.HealthCheckResponse.SERVING
        installed.trust(others.file)
        assert await serving.accepts(servers.file, client) == set()
        assert await serving.accepts(servers.file, other) == BOTH
        assert await check(channel) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
def test_files_that_vanish_while_they_are_read_keep_the_certificates_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    authority = Authority(tmp_path / "old")
    installed = Installed(tmp_path / "server", authority.issue(HOST), authority.file)
    assert installed.client_ca is not None
    files = TlsFiles(installed.pair.certificate, installed.pair.key, installed.client_ca)
    tls, path = ServerTls(files), getattr(files, name)
    before, content, read = tls.current(), path.read_bytes(), PemFile.read

    def reading(file: PemFile) -> bytes:
        found = read(file)
        if file.path == path:
            path.unlink()
        return found

    for _ in range(3):
        replace(path, content + b"\n")
        with monkeypatch.context() as vanishing:
            vanishing.setattr(PemFile, "read", reading)
            assert tls.current() is before
        # They are there again.
        replace(path, content)
        assert tls.current() is not before
        before = tls.current()


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca")
    pair, paths, read = authority.issue(HOST), [], PemFile.read

    def reading(file: PemFile) -> bytes:
        paths.append(file.path)
        return read(file)

    monkeypatch.setattr(PemFile, "read", reading)
    ServerTls(TlsFiles(pair.certificate, pair.key, authority.file))
    assert paths == [pair.certificate, pair.key, authority.file]


def test_an_authority_may_have_comments_in_any_language(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "old")
    file = tmp_path / "ca.crt"
    certificates = authority.file.read_bytes()
    file.write_bytes("# Autorité\n".encode() + certificates + "# fin de l'autorité\n".encode("utf-16"))
    context = ssl.create_default_context()
    before = len(context.get_ca_certs())
    assert PemFile(file, "GPTLOOP_TLS_CA").load_authority(context) == certificates
    assert len(context.get_ca_certs()) == before + 1


@pytest.mark.parametrize("at", [3, 15, 100, -10])
def test_an_authority_with_bytes_that_no_certificate_has_is_refused(tmp_path: Path, at: int) -> None:
    content = Authority(tmp_path / "ca").file.read_bytes()
    file = tmp_path / "ca.crt"
    file.write_bytes(content[:at] + b"\xff" + content[at:])
    with pytest.raises(InvalidArgument, match=r"ca\.crt', which contains no certificates in PEM form"):
        PemFile(file, "GPTLOOP_TLS_CA").load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


@async_test
async def test_a_connection_has_little_memory(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    async with Serving(Installed(tmp_path / "server", authority.issue(HOST))).started() as serving:
        context, count = ssl.create_default_context(cafile=authority.file), 20
        tracemalloc.start()
        try:
            opened = [await asyncio.open_connection(HOST, serving.plain_port, ssl=context) for _ in range(count)]
            used, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # Of both ends.
        assert used / count < 2 * (64 << 10)
        for _, writer in opened:
            writer.close()


@pytest.mark.parametrize("breaks", ["key", "empty", "removed", "authority"])
@async_test
async def test_files_that_cannot_be_used_keep_the_certificates_from_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, breaks: str
) -> None:
    authority, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    client = authority.issue("client")
    installed = Installed(tmp_path / "server", authority.issue(HOST), authority.file)
    async with Serving(installed).started() as serving:
        match breaks:
            case "key":
                replace(installed.pair.key, client.key.read_bytes())
            case "empty":
                replace(installed.pair.certificate, b"")
            case "removed":
                installed.pair.certificate.unlink()
            case "authority":
                assert installed.client_ca is not None
                replace(installed.client_ca, b"nothing")
        for _ in range(3):
            assert await serving.accepts(authority.file, client) == BOTH
        (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
        assert "keep the certificates from before: GPTLOOP_TLS_" in record.getMessage()
        # Whole files end it.
        assert installed.client_ca is not None
        installed.trust(authority.file)
        installed.replace(new.issue(HOST))
        assert await serving.accepts(new.file, client) == BOTH


def test_a_key_that_could_not_be_read_is_read_once_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca")
    installed = Installed(tmp_path / "server", authority.issue(HOST))
    tls = ServerTls(TlsFiles(installed.pair.certificate, installed.pair.key))
    before = tls.current()
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        # Root, who may run the tests, may read every file.
        if path == installed.pair.key and not path.stat().st_mode & 0o040:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    installed.replace(authority.issue(HOST))
    installed.pair.key.chmod(0o600)
    assert tls.current() is before
    installed.pair.key.chmod(0o640)
    assert tls.current() is not before


@async_test
async def test_a_connection_has_at_least_version_1_2(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    async with Serving(Installed(tmp_path / "server", authority.issue(HOST))).started() as serving:
        for version, works in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            context = ssl.create_default_context(cafile=authority.file)
            # Lets this client offer old versions.
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = context.maximum_version = version
            for port in (serving.port, serving.plain_port):
                try:
                    (await asyncio.to_thread(Line, port, context)).close()
                    assert works
                except ssl.SSLError:
                    assert not works


def test_the_end_of_the_certificate_is_that_of_the_files_now(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    installed = Installed(tmp_path / "server", authority.issue(HOST, expired=True))
    tls = ServerTls(TlsFiles(installed.pair.certificate, installed.pair.key))
    before = tls.current().ends_at
    installed.replace(authority.issue(HOST))
    assert before < time.time() < tls.current().ends_at


def test_without_settings_there_is_no_tls() -> None:
    assert read_tls({}) is None
    assert read_tls({"GPTLOOP_TLS_CERT": " "}) is None


@pytest.mark.parametrize(
    ("given", "named", "missing"),
    [
        (("CERT",), "CERT", "GPTLOOP_TLS_KEY"),
        (("KEY",), "KEY", "GPTLOOP_TLS_CERT"),
        (("CLIENT_CA",), "CLIENT_CA", "GPTLOOP_TLS_CERT and GPTLOOP_TLS_KEY"),
        (("CLIENT_CA", "CERT"), "CERT", "GPTLOOP_TLS_KEY"),
    ],
)
def test_a_missing_part_is_named(given: tuple[str, ...], named: str, missing: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_tls({f"GPTLOOP_TLS_{name}": "file.pem" for name in given})
    sentence = f"GPTLOOP_TLS_{named} is set, but not {missing}; a server with TLS needs its certificate and key."
    assert str(refused.value) == sentence


def test_each_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair, other = authority.issue(HOST), authority.issue("other")
    nothing = replace(tmp_path / "nothing.pem", b"nothing")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    encrypted = replace(tmp_path / "encrypted.key", locked)
    broken = replace(tmp_path / "broken.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    absent = tmp_path / "absent.pem"
    good = TlsFiles(pair.certificate, pair.key)
    for files, sentence in (
        (dataclasses.replace(good, certificate=absent), f"CERT is '{absent}', which cannot be read: No such file"),
        (
            dataclasses.replace(good, certificate=tmp_path),
            f"CERT is '{tmp_path}', which cannot be read: Is a directory",
        ),
        (dataclasses.replace(good, certificate=nothing), f"CERT is '{nothing}', which contains no certificate in PEM"),
        (dataclasses.replace(good, key=nothing), f"KEY is '{nothing}', which contains no private key in PEM form."),
        (dataclasses.replace(good, key=other.key), f"KEY is '{other.key}', which is not the key of the certificate in"),
        (dataclasses.replace(good, key=encrypted), f"KEY is '{encrypted}', which is encrypted with a password;"),
        (dataclasses.replace(good, certificate=broken), f"CERT is '{broken}', which cannot be used with the key in"),
        (dataclasses.replace(good, client_ca=nothing), f"CLIENT_CA is '{nothing}', which contains no certificates in"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            ServerTls(files)
        assert str(refused.value).startswith(f"GPTLOOP_TLS_{sentence}")
