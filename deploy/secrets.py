"""Makes the secrets that containers read: `python -m deploy.secrets FOLDER NAME …`.

    authority/   ca.key and ca.crt, which sign the certificate
    tls/         tls.crt, tls.key and ca.crt; tls.crt is for the names, such as localhost
    tokens/      clients and operators, the lists of the services; operator, the token of this stack's own commands
    redis/       password
    grafana/     password

Keeps every secret that exists, so that it can run before each start. Replaces a certificate of its own authority that
ends within 30 days or lacks one of the names, by one for the names of this call. Leaves those of other authorities to
whoever put them there.
"""

import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from shared.atomic_file import replacing
from shared.errors import FailedPrecondition, InvalidArgument, shown

_AUTHORITY_DAYS, _CERTIFICATE_DAYS, _RENEWED_BEFORE_DAYS = 3650, 365, 30
# Readable by the user of the services only, and by any user of a container that mounts the folder.
_OWN, _SHARED = 0o400, 0o444
_MAX_NAME = 253
_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_OUR_ISSUER = re.compile(r"Issuer: CN ?= ?gptloop$", re.MULTILINE)
# A name whose last part is a number is an address with a mistake in it.
_NAME = re.compile(rf"(\*\.)?({_LABEL}\.)*(?![0-9]+\Z){_LABEL}")


def make_secrets(folder: Path, names: Sequence[str]) -> list[str]:
    """Makes what is missing in a folder, and returns the paths in it that were written.

    names: the names and addresses of the certificate. Raises `InvalidArgument` if one of them cannot be one, and
    `FailedPrecondition` if the key of the authority or openssl is missing, or openssl fails.
    """
    alternative_names = [_alternative_name(name) for name in names]
    made = []

    def make(path: str, text: Callable[[], str], mode: int) -> None:
        if not (folder / path).exists():
            _write(folder / path, text(), mode)
            made.append(path)

    if not (folder / "authority/ca.crt").exists():
        _make_authority(folder / "authority")
        made.append("authority/ca.crt")
    authority = (folder / "authority/ca.crt").read_text()
    if not _is_current(folder / "tls", authority, set(alternative_names)):
        _make_certificate(folder / "authority", folder / "tls", alternative_names)
        made.append("tls/tls.crt")
    make("tokens/clients", lambda: f"first {_token()}\n", _OWN)
    make("tokens/operator", lambda: f"compose {_token()}\n", _OWN)
    make("tokens/operators", (folder / "tokens/operator").read_text, _OWN)
    make("redis/password", _token, _SHARED)
    make("grafana/password", _token, _SHARED)
    return made


def _token() -> str:
    return secrets.token_urlsafe(32)


def _write(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, mode=mode) as file:
        file.write(text.encode())


def _make_authority(authority: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        key, certificate = f"{made}/ca.key", f"{made}/ca.crt"
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=gptloop", "-days", str(_AUTHORITY_DAYS), "-keyout", key, "-out", certificate),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
        _write(authority / "ca.key", Path(key).read_text(), _OWN)
        _write(authority / "ca.crt", Path(certificate).read_text(), _SHARED)


def _make_certificate(authority: Path, tls: Path, alternative_names: Sequence[str]) -> None:
    if not (authority / "ca.key").exists():
        raise FailedPrecondition(
            f"{authority}/ca.key is missing, without which no certificate can be made: put it back, or install your "
            f"own certificate in {tls} for {', '.join(alternative_names)}."
        )
    with tempfile.TemporaryDirectory() as made:
        key, request, certificate, extensions = (f"{made}/{name}" for name in ("key", "request", "crt", "extensions"))
        Path(extensions).write_text(
            f"subjectAltName={','.join(alternative_names)}\n"
            "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=gptloop", "-keyout", key, "-out", request),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", f"{authority}/ca.crt", "-CAkey", f"{authority}/ca.key"),
            *("-CAcreateserial", "-CAserial", f"{made}/serial", "-days", str(_CERTIFICATE_DAYS)),
            *("-extfile", extensions, "-out", certificate),
        )
        _write(tls / "tls.key", Path(key).read_text(), _OWN)
        _write(tls / "tls.crt", Path(certificate).read_text(), _SHARED)
        # Last, because it tells the next call that the certificate is of this authority.
        _write(tls / "ca.crt", (authority / "ca.crt").read_text(), _SHARED)


def _alternative_name(name: str) -> str:
    try:
        address = ip_address(name)
    except ValueError:
        if len(name) <= _MAX_NAME and _NAME.fullmatch(name):
            return f"DNS:{name.lower()}"
    else:
        if not (isinstance(address, IPv6Address) and address.scope_id):
            return f"IP:{address}"
    raise InvalidArgument(
        f"A name of the certificate is {shown(name, 80)}, but must be a host name in ASCII of at most {_MAX_NAME} "
        "characters, such as models.example, or an address, such as 127.0.0.1."
    )


def _is_current(tls: Path, authority: str, alternative_names: set[str]) -> bool:
    if not (tls / "tls.crt").exists():
        return False
    show = ("x509", "-in", f"{tls}/tls.crt", "-noout")
    try:
        text = _openssl(*show, "-text")
        if not _OUR_ISSUER.search(text):
            return True
        _openssl(*show, "-checkend", str(_RENEWED_BEFORE_DAYS * 86400))
    except _OpensslFailed:
        # It is not a certificate, or ends soon.
        return False
    if not (tls / "ca.crt").exists() or (tls / "ca.crt").read_text() != authority:
        return False
    found = {f"DNS:{name.lower()}" for name in re.findall(r"\bDNS:([^,\s]+)", text)}
    found |= {f"IP:{ip_address(address)}" for address in re.findall(r"\bIP Address:([0-9A-F:.]+)", text)}
    return alternative_names <= found


class _OpensslFailed(FailedPrecondition):
    """The exit code of openssl is not 0."""


def _openssl(*arguments: str) -> str:
    try:
        return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise FailedPrecondition("openssl is not installed; on Debian and Ubuntu: apt-get install openssl.") from None
    except subprocess.CalledProcessError as error:
        raise _OpensslFailed(f"openssl {arguments[0]} failed: {error.stderr.strip()}") from None


def main() -> int:
    """Makes the secrets and returns the exit status."""
    if len(sys.argv) < 3:
        print("error: Name a folder and the names of the certificate: deploy.secrets FOLDER NAME …", file=sys.stderr)
        return 2
    try:
        made = make_secrets(Path(sys.argv[1]), sys.argv[2:])
    except (FailedPrecondition, InvalidArgument, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    print(f"Made {', '.join(made)}." if made else "Every secret exists.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
