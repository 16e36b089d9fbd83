"""The way to Redis: where it is, with what name and password, and what each of its failures means."""

import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from redis import CredentialProvider, Redis
from redis import exceptions as failures

from shared.errors import FailedPrecondition, InvalidArgument, Unavailable, shown
from shared.service.settings import Directories, Environment, read_str
from shared.text import excerpt
from trainer_service.redis_server import OLDEST, socket_path, version_text

_PASSWORD_FILE = "GPTLOOP_REDIS_PASSWORD_FILE"
_MAX_PASSWORD_BYTES = 4096
# A call waits this long for an answer; training waits for none.
_ANSWER_LIMIT_S = 5.0


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is: a URL, and the file with the password, which is read for each new connection.

    No message and no `repr` contains the URL, which may contain a password.
    """

    url: str = field(repr=False)
    password_file: Path | None = None


class _NoPassword(failures.AuthenticationError):
    """The password file cannot be used; the text is a whole sentence."""


class _PasswordFile(CredentialProvider):
    """Reads the password when a connection is made, so that a new password needs no restart."""

    def __init__(self, user: str, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Returns the name, if there is one, and the password; raises `_NoPassword` without one."""
        try:
            password = _read_password(self._path)
        except InvalidArgument as error:
            raise _NoPassword(str(error)) from None
        return (self._user, password) if self._user else (password,)


def _read_password(path: Path) -> str:
    try:
        with path.open("rb") as file:
            lines = file.read(_MAX_PASSWORD_BYTES).decode().splitlines()
    except OSError as error:
        raise InvalidArgument(f"{_PASSWORD_FILE} is {shown(path)}, which cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        lines = []
    if len(lines) != 1 or not lines[0].strip():
        raise InvalidArgument(f"{_PASSWORD_FILE} is {shown(path)}, which must contain one line, the password.")
    return lines[0].strip()


def read_redis(environment: Environment, directories: Directories) -> RedisAddress:
    """Reads `REDIS_URL` and the file of its password; without a URL it is the embedded server's socket.

    Raises `InvalidArgument`, which names the variable and never a password.
    """
    url = read_str(environment, "REDIS_URL", "")
    file = read_str(environment, _PASSWORD_FILE, "")
    if not url:
        if file:
            raise InvalidArgument(f"{_PASSWORD_FILE} needs REDIS_URL: the embedded Redis has no password.")
        return RedisAddress(f"unix://{quote(str(socket_path(directories.redis)))}")
    try:
        parts = urlsplit(url)
        has_password = bool(parts.password)
    except ValueError as error:
        raise InvalidArgument(f"REDIS_URL cannot be understood: {_message(error)}.") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise InvalidArgument(
            "REDIS_URL must begin with redis://, rediss:// or unix://, as redis://localhost:6379 does."
        )
    if parts.scheme != "unix" and not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
        # The client would use database 0.
        raise InvalidArgument(
            f"REDIS_URL ends in {shown(parts.path, 40)}, but only the number of a database can follow the host, as in "
            "redis://localhost:6379/0."
        )
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    if file and (has_password or "password" in options):
        raise InvalidArgument(f"{_PASSWORD_FILE} names a password, and REDIS_URL has one too: remove it from the URL.")
    _check_tls(parts.scheme, options)
    address = RedisAddress(url, Path(file).absolute() if file else None)
    if address.password_file is not None:
        _read_password(address.password_file)
    try:
        client = connect(address)
        # Checks every option, and does not connect.
        client.connection_pool.make_connection()
        client.close()
    except (ValueError, TypeError, failures.RedisError) as error:
        raise InvalidArgument(f"REDIS_URL cannot be understood: {_message(error)}.") from None
    return address


def _check_tls(scheme: str, options: dict[str, str]) -> None:
    """Raises `InvalidArgument` if a certificate of the URL cannot be used, which would show at the first call only."""
    names = [name for name in options if name.startswith("ssl_")]
    if scheme != "rediss":
        if names:
            raise InvalidArgument(f"REDIS_URL has {names[0]}, which needs rediss:// in the place of {scheme}://.")
        return
    authority, certificate, key = (options.get(f"ssl_{name}") for name in ("ca_certs", "certfile", "keyfile"))
    if key and not certificate:
        raise InvalidArgument("REDIS_URL has ssl_keyfile, but no ssl_certfile.")
    for name, path in (("ssl_ca_certs", authority), ("ssl_certfile", certificate), ("ssl_keyfile", key)):
        try:
            if path:
                Path(path).open("rb").close()
        except OSError as error:
            raise InvalidArgument(
                f"REDIS_URL has {name}={shown(path)}, which cannot be read: {error.strerror}."
            ) from None
    try:
        context = ssl.create_default_context(cafile=authority)
    except ssl.SSLError:
        raise InvalidArgument(f"REDIS_URL has ssl_ca_certs={shown(authority)}, which has no certificate.") from None
    try:
        if certificate:
            context.load_cert_chain(certificate, key, options.get("ssl_password", ""))
    except ssl.SSLError:
        raise InvalidArgument(
            f"REDIS_URL has ssl_certfile={shown(certificate)}, which is not a certificate with its key."
        ) from None


def connect(address: RedisAddress) -> Redis:
    """Returns a client of the server at an address, which connects when it is first used."""
    # Without driver_info the client does not send CLIENT SETINFO, for which Redis before 7.2 has no right.
    url, options = address.url, dict[str, Any](driver_info=None)
    if address.password_file is not None:
        # The client takes the name from the URL or from the provider, but not from both.
        parts = urlsplit(url)
        url = url.replace(f"//{parts.netloc}", f"//{parts.netloc.rpartition('@')[2]}", 1)
        options["credential_provider"] = _PasswordFile(unquote(parts.username or ""), address.password_file)
    return Redis.from_url(
        url, socket_connect_timeout=_ANSWER_LIMIT_S, socket_timeout=_ANSWER_LIMIT_S, health_check_interval=30, **options
    )


def check_server(connection: Redis) -> None:
    """Raises `FailedPrecondition` if a server is too old or may evict jobs, and `Unavailable` if it does not answer."""
    with reachable(connection):
        server: Any = connection.info("server")
        memory: Any = connection.info("memory")
        replication: Any = connection.info("replication")
    if replication.get("role") == "slave":
        raise redis_failure(failures.ReadOnlyError())
    found = re.match(r"(\d+)\.(\d+)", str(server.get("redis_version", "")))
    if found and (version := (int(found[1]), int(found[2]))) < OLDEST:
        raise FailedPrecondition(f"Redis is {version_text(version)}, but must be {version_text(OLDEST)} or newer.")
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if memory.get("maxmemory") and policy != "noeviction":
        raise FailedPrecondition(
            f"Redis removes keys when its memory is full (maxmemory-policy {policy}), and jobs with them: set its "
            "maxmemory-policy to noeviction, or its maxmemory to 0."
        )


def redis_failure(error: failures.RedisError) -> Unavailable:
    """Turns the failure of a command into an error that says what to do."""
    text = _message(error)
    match error:
        case _NoPassword():
            return Unavailable(str(error))
        case failures.OutOfMemoryError():
            return Unavailable("Redis is out of memory: raise its maxmemory, or remove other data from it.")
        case failures.AuthenticationError() | failures.AuthorizationError():
            return Unavailable(f"Redis refuses the name or the password of REDIS_URL and {_PASSWORD_FILE} ({text}).")
        case failures.NoPermissionError():
            return Unavailable(
                f"Redis refuses a command to the user that REDIS_URL names ({text}); deploy/redis/users.acl has the "
                "rights that it needs."
            )
        case failures.BusyLoadingError():
            return Unavailable("Redis is still loading its data; try again when it has finished.")
        case failures.ReadOnlyError():
            return Unavailable("Redis is a read-only replica: REDIS_URL must name its primary.")
        case failures.ResponseError():
            return Unavailable(f"Redis refuses a command: {text}.")
        case failures.TimeoutError():
            return Unavailable(f"Redis does not answer within {_ANSWER_LIMIT_S:.0f} s: it is stopped, blocked or far.")
    if refused := re.search(r"certificate verify failed: ([^(]+)", text):
        return Unavailable(
            f"The certificate of Redis is refused ({refused[1].strip()}): renew it, or correct "
            "ssl_ca_certs in REDIS_URL."
        )
    return Unavailable(f"Redis does not answer ({text}). Start everything with `gptloop up`, or correct REDIS_URL.")


def _message(error: Exception) -> str:
    # The client puts the whole command before the message of the server.
    return excerpt(str(error).rpartition("caused error: ")[2].rstrip("."), 150)


@contextmanager
def reachable(connection: Redis) -> Iterator[None]:
    """Turns every error of Redis into `Unavailable`.

    Closes the idle connections to a server that has become a replica: the next call finds the new primary under the
    same name.
    """
    try:
        yield
    except failures.RedisError as error:
        if isinstance(error, failures.ReadOnlyError):
            connection.connection_pool.disconnect(inuse_connections=False)
        raise redis_failure(error) from error


class Outage:
    """Measures how long Redis, or a worker, has not answered; retries end after `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None

    def end(self) -> None:
        """Notes that there was an answer."""
        self._since_s = None

    @property
    def has_begun(self) -> bool:
        """Whether there was no answer to the last call."""
        return self._since_s is not None

    def may_retry(self) -> bool:
        """Notes that there was no answer; returns whether the outage is still shorter than `limit_s`."""
        if self._since_s is None:
            self._since_s = time.monotonic()
        return time.monotonic() - self._since_s < self._limit_s
