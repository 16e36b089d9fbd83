"""Reads certificates and keys in PEM files, with errors that name the setting."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shared.errors import InvalidArgument, shown

# Paths are quoted whole unless they are very long.
_PATH_LETTERS = 150


@dataclass(frozen=True)
class PemFile:
    """A PEM file and the setting that names it."""

    path: Path
    setting: str

    def read(self) -> bytes:
        """Returns the bytes of the file; raises `InvalidArgument` if it cannot be read."""
        try:
            return self.path.read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidArgument(f"{self} cannot be read: {reason}.") from None

    def load_authority(self, context: ssl.SSLContext) -> bytes:
        """Makes a context trust the certificates in the file, and returns them in PEM form.

        Raises `InvalidArgument` if it cannot be read or has no certificates.
        """
        certificates = _without_comments(self.read())
        try:
            # The path could lead to another file by now, or to none.
            context.load_verify_locations(cadata=certificates.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise InvalidArgument(f"{self} contains no certificates in PEM form.") from None
        return certificates

    def __str__(self) -> str:
        """Returns how an error names the file."""
        return f"{self.setting} is {shown(str(self.path), _PATH_LETTERS)}, which"


def _without_comments(content: bytes) -> bytes:
    """Returns the lines from each BEGIN to its END; those around them may be in any language."""
    kept, is_inside = [], False
    for line in content.splitlines(keepends=True):
        begins, ends = line.startswith(b"-----BEGIN "), line.startswith(b"-----END ")
        if is_inside or begins:
            kept.append(line)
        is_inside = (is_inside or begins) and not ends
    return b"".join(kept)


def load_pair(context: ssl.SSLContext, certificate: PemFile, key: PemFile) -> tuple[bytes, bytes]:
    """Gives a context its own certificate chain and key, and returns the bytes of both files.

    Raises `InvalidArgument` if they do not belong together.
    """
    chain, own_key = certificate.read(), key.read()
    if b"CERTIFICATE-----" not in chain:
        raise InvalidArgument(f"{certificate} contains no certificate in PEM form.")
    if b"PRIVATE KEY-----" not in own_key:
        raise InvalidArgument(f"{key} contains no private key in PEM form.")

    def refuse() -> NoReturn:
        raise InvalidArgument(f"{key} is encrypted with a password; it must be readable without one.")

    try:
        context.load_cert_chain(certificate.path, key.path, refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidArgument(f"{key} is not the key of the certificate in {certificate.setting}.") from None
        raise InvalidArgument(
            f"{certificate} cannot be used with the key in {key.setting}: {error.reason or error}."
        ) from None
    except OSError as error:
        raise InvalidArgument(f"{certificate} or {key.setting} cannot be read: {error.strerror}.") from None
    return chain, own_key
