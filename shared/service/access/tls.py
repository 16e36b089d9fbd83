"""The TLS of a server: its certificate and the authority of its clients, read again when their files change."""

import logging
import ssl
import threading
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from shared.errors import InvalidArgument
from shared.service.access.expiry import ends_at
from shared.service.access.file_stamp import stamp_of
from shared.service.access.pem import PemFile, load_pair
from shared.service.settings import Environment, read_str

logger = logging.getLogger(__name__)

CERTIFICATE_VARIABLE = "GPTLOOP_TLS_CERT"
KEY_VARIABLE = "GPTLOOP_TLS_KEY"
CLIENT_CA_VARIABLE = "GPTLOOP_TLS_CLIENT_CA"

# The longest record of TLS (RFC 8446, section 5.1).
_RECORD_BYTES = 16 << 10


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the server's certificate chain, its key, and the authority that must have signed clients' ones."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Returns every file."""
        return (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))


def read_tls(environment: Environment) -> TlsFiles | None:
    """Reads which files a server uses, None if it serves without TLS.

    Raises `InvalidArgument`, which names the wrong variable, if a part is missing; `ServerTls` reads the files.
    """
    names = (CERTIFICATE_VARIABLE, KEY_VARIABLE, CLIENT_CA_VARIABLE)
    certificate, key, client_ca = (read_str(environment, name, "") for name in names)
    if certificate and key:
        return TlsFiles(Path(certificate), Path(key), Path(client_ca) if client_ca else None)
    for name, value in zip(names, (certificate, key, client_ca), strict=True):
        if value:
            missing = " and ".join(each for each in names[:2] if not environment.get(each, "").strip())
            raise InvalidArgument(f"{name} is set, but not {missing}; a server with TLS needs its certificate and key.")
    return None


@dataclass(frozen=True)
class _Certificates:
    """What the files had in them at one time, for gRPC and for Python."""

    configuration: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext
    # When the server's own certificate ends, in seconds since the epoch.
    ends_at: float


class ServerTls:
    """Serves each new connection with what the files contain now; open connections keep theirs.

    Files that cannot be used are reported once in the log, and leave what was used before. Any thread may use it.
    Raises `InvalidArgument` if they cannot be used at the start.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self._certificates = self._read()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Returns credentials for gRPC servers."""
        used = self._certificates

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            current = self.current()
            if current is used:
                return None
            used = current
            return current.configuration

        return grpc.dynamic_ssl_server_credentials(
            used.configuration,
            changed,  # type: ignore[arg-type]  # None means no change
            require_client_authentication=self._files.client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """Returns a context for servers of asyncio, whose buffers for TLS have the size of a record from now on."""
        # 256 KiB otherwise, which each connection has before any certificate is checked. Before Python 3.11.8 a failed
        # handshake also leaves its buffer to the garbage collector (python/cpython#109534).
        SSLProtocol.max_size = _RECORD_BYTES
        return _ChangingContext.of(lambda: self.current().context)

    def current(self) -> _Certificates:
        """Returns what the files contain now, or contained when they could be used last; never raises."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._reload(stamp)
            return self._certificates

    def _reload(self, stamp: object) -> None:
        try:
            certificates = self._read()
        except InvalidArgument as error:
            self._stamp = stamp
            logger.error("new connections keep the certificates from before: %s", error)
            return
        # Otherwise a file has changed while it was read, and the next connection reads them once more.
        if stamp == self._stamp_now():
            self._stamp, self._certificates = stamp, certificates
            logger.info("new connections use the certificate in %s", self._files.certificate)

    def _stamp_now(self) -> object:
        """Returns a value that changes with the files."""
        return [stamp_of(path) for path in self._files.paths]

    def _read(self) -> _Certificates:
        certificate = PemFile(self._files.certificate, CERTIFICATE_VARIABLE)
        key = PemFile(self._files.key, KEY_VARIABLE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        chain, own_key = load_pair(context, certificate, key)
        authority = None
        if self._files.client_ca is not None:
            authority = PemFile(self._files.client_ca, CLIENT_CA_VARIABLE).load_authority(context)
            context.verify_mode = ssl.CERT_REQUIRED
        try:
            end = ends_at(chain)
        except ValueError as error:
            raise InvalidArgument(f"{certificate} cannot be used: {error}.") from None
        return _Certificates(grpc.ssl_server_certificate_configuration([(own_key, chain)], authority), context, end)


class _ChangingContext(ssl.SSLContext):
    """A context that makes each connection with the context that is current then."""

    _current: Callable[[], ssl.SSLContext]

    @classmethod
    def of(cls, current: Callable[[], ssl.SSLContext]) -> "_ChangingContext":
        context = cls(ssl.PROTOCOL_TLS_SERVER)
        context._current = current
        return context

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """Begins a connection."""
        return self._current().wrap_bio(*arguments, **options)
