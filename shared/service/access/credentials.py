"""What a client needs to be let in: whom it trusts, its own certificate, and its token."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from shared.errors import InvalidArgument, shown
from shared.service.access.pem import PemFile, load_pair
from shared.service.settings import Environment, read_str

CA_VARIABLE = "GPTLOOP_TLS_CA"
CERTIFICATE_VARIABLE = "GPTLOOP_TLS_CLIENT_CERT"
KEY_VARIABLE = "GPTLOOP_TLS_CLIENT_KEY"
SERVER_NAME_VARIABLE = "GPTLOOP_TLS_SERVER_NAME"
TOKEN_VARIABLE = "GPTLOOP_TOKEN_FILE"

# The value of `ca` that stands for the authorities that the system trusts.
SYSTEM = "system"

_VARIABLES = {
    "ca": CA_VARIABLE,
    "certificate": CERTIFICATE_VARIABLE,
    "key": KEY_VARIABLE,
    "server_name": SERVER_NAME_VARIABLE,
}
_FIELDS = {name: name for name in _VARIABLES}


@dataclass(frozen=True)
class Credentials:
    """How a client connects. Files are read when a client is created.

    ca: a PEM file with the certificates of authorities that may sign the server's certificate, or `system` for those
        that the system trusts. Without it the client does not use TLS.
    certificate, key: PEM files with the client's own certificate and its key, if the server asks for one.
    server_name: the name that the server's certificate must have; by default the host of the address.
    token: the bearer token that every call carries.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None
    token: str = field(default="", repr=False)

    def to_channel_credentials(self, names: Mapping[str, str] = _FIELDS) -> grpc.ChannelCredentials | None:
        """Reads the files; returns None if the client does not use TLS.

        Raises `InvalidArgument` if a file cannot be used; `names` maps the fields to what the error calls them.
        """
        if self.ca is None:
            for name in ("certificate", "key", "server_name"):
                if getattr(self, name) is not None:
                    raise InvalidArgument(
                        f"{names[name]} is set, but not {names['ca']}, without which the client does not use TLS; set "
                        f"it to a file with the authority of the server's certificate, or to {SYSTEM}."
                    )
            return None
        # Checks what gRPC would only report as a failed connection.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca == SYSTEM:
            authorities = _system_authorities()
        else:
            authorities = PemFile(Path(self.ca), names["ca"]).load_authority(context)
        if self.certificate is None and self.key is None:
            return grpc.ssl_channel_credentials(authorities)
        if self.certificate is None or self.key is None:
            there, missing = ("key", "certificate") if self.certificate is None else ("certificate", "key")
            raise InvalidArgument(f"{names[there]} is set, but not {names[missing]}; a client needs both or neither.")
        certificate = PemFile(Path(self.certificate), names["certificate"])
        key = PemFile(Path(self.key), names["key"])
        chain, own_key = load_pair(context, certificate, key)
        return grpc.ssl_channel_credentials(authorities, own_key, chain)

    def to_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata that every call carries."""
        _check_token("The token", self.token)
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


# No TLS and no token.
PLAIN = Credentials()


def read_credentials(environment: Environment) -> Credentials:
    """Reads the credentials of the commands; raises `InvalidArgument` that names the wrong variable."""
    found = Credentials(
        ca=read_str(environment, CA_VARIABLE, "") or None,
        certificate=read_str(environment, CERTIFICATE_VARIABLE, "") or None,
        key=read_str(environment, KEY_VARIABLE, "") or None,
        server_name=read_str(environment, SERVER_NAME_VARIABLE, "") or None,
        token=_read_token(read_str(environment, TOKEN_VARIABLE, "")),
    )
    found.to_channel_credentials(_VARIABLES)
    return found


def _read_token(path: str) -> str:
    """Returns the token in a file with one line, `token` or `name token`; comments begin with #."""
    if not path:
        return ""
    file = f"{TOKEN_VARIABLE} is {shown(path, 150)}, which"
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidArgument(f"{file} cannot be read: {reason}.") from None
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if len(lines) != 1 or len(lines[0]) > 2:
        raise InvalidArgument(f"{file} must have one line with your token, or with a name and your token.")
    token = lines[0][-1]
    _check_token(f"The token in {TOKEN_VARIABLE}", token)
    return token


def _check_token(name: str, token: str) -> None:
    """Raises `InvalidArgument`, which never quotes the token, if gRPC metadata cannot carry it."""
    if not (token.isascii() and token.isprintable()):
        raise InvalidArgument(
            f"{name} contains a character that metadata cannot carry; use printable ASCII on one line."
        )


def _system_authorities() -> bytes | None:
    """Returns the authorities that the system trusts; None for the list that gRPC brings, if the system has no file."""
    file = ssl.get_default_verify_paths().cafile
    return Path(file).read_bytes() if file else None
