"""Makes the secrets that containers read: `python -m deploy.secrets FOLDER NAME …`.

    authority/   ca.key and ca.crt, which sign the certificate
    tls/         tls.crt, tls.key and ca.crt; tls.crt is for the names, such as localhost
    tokens/      clients and operators, the lists of the services; operator, the token of this stack's own commands
    redis/       password
    grafana/     password

Keeps every secret that exists, so that it can run before each start. Replaces a certificate that ends within 30 days.
"""

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path

from shared.atomic_file import replacing
from shared.errors import FailedPrecondition

_AUTHORITY_DAYS, _CERTIFICATE_DAYS, _RENEWED_BEFORE_DAYS = 3650, 365, 30
# Readable by the user of the services only, and by any user of a container that mounts the folder.
_OWN, _SHARED = 0o400, 0o444


def make_secrets(folder: Path, names: Sequence[str]) -> list[str]:
    """Makes what is missing in a folder, and returns the paths in it that were written.

    names: the names and addresses of the certificate. Raises `FailedPrecondition` if openssl is missing or fails.
    """
    made = []

    def make(path: str, text: Callable[[], str], mode: int) -> None:
        if not (folder / path).exists():
            _write(folder / path, text(), mode)
            made.append(path)

    if not (folder / "authority/ca.crt").exists():
        _make_authority(folder / "authority")
        made.append("authority/ca.crt")
    authority = (folder / "authority/ca.crt").read_text()
    if not _is_current(folder / "tls/tls.crt") or (folder / "tls/ca.crt").read_text() != authority:
        _make_certificate(folder / "authority", folder / "tls", names)
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


def _make_certificate(authority: Path, tls: Path, names: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        key, request, certificate, extensions = (f"{made}/{name}" for name in ("key", "request", "crt", "extensions"))
        Path(extensions).write_text(
            f"subjectAltName={','.join(map(_alternative_name, names))}\n"
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
        ip_address(name)
    except ValueError:
        return f"DNS:{name}"
    return f"IP:{name}"


def _is_current(certificate: Path) -> bool:
    limit_s = _RENEWED_BEFORE_DAYS * 86400
    if not certificate.exists():
        return False
    command = ["openssl", "x509", "-in", str(certificate), "-noout", "-checkend", str(limit_s)]
    return subprocess.run(command, capture_output=True).returncode == 0


def _openssl(*arguments: str) -> None:
    try:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise FailedPrecondition("openssl is not installed; on Debian and Ubuntu: apt-get install openssl.") from None
    except subprocess.CalledProcessError as error:
        raise FailedPrecondition(f"openssl {arguments[0]} failed: {error.stderr.strip()}") from None


def main() -> int:
    """Makes the secrets and returns the exit status."""
    if len(sys.argv) < 3:
        print("error: Name a folder and the names of the certificate: deploy.secrets FOLDER NAME …", file=sys.stderr)
        return 2
    try:
        made = make_secrets(Path(sys.argv[1]), sys.argv[2:])
    except (FailedPrecondition, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Made {', '.join(made)}." if made else "Every secret exists.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
