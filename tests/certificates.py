"""Certificates for tests of TLS: real ones, from authorities that live as long as the test."""

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme

_PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """An authority and the certificates that it signs, as files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.file = replace(folder / "ca.pem", self._ca.cert_pem.bytes())

    def issue(self, *names: str, expired: bool = False) -> Pair:
        """Signs a certificate with names or addresses."""
        signed = self._ca.issue_cert(*names, not_after=_PAST if expired else None)
        chain = b"".join(part.bytes() for part in signed.cert_chain_pems)
        stem = f"{names[0]}-{len(list(self._folder.iterdir()))}"
        return Pair(
            replace(self._folder / f"{stem}.pem", chain),
            replace(self._folder / f"{stem}.key", signed.private_key_pem.bytes()),
        )


class Installed:
    """The files that a server reads, and their replacement while it runs."""

    def __init__(self, folder: Path, pair: Pair, client_ca: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.pair = Pair(folder / "tls.crt", folder / "tls.key")
        self.client_ca = folder / "ca.crt" if client_ca else None
        self.replace(pair)
        if client_ca:
            self.trust(client_ca)

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a server with these files."""
        files = {"GPTLOOP_TLS_CERT": str(self.pair.certificate), "GPTLOOP_TLS_KEY": str(self.pair.key)}
        return files | ({"GPTLOOP_TLS_CLIENT_CA": str(self.client_ca)} if self.client_ca else {})

    def replace(self, pair: Pair) -> None:
        """Installs another certificate."""
        replace(self.pair.key, pair.key.read_bytes())
        replace(self.pair.certificate, pair.certificate.read_bytes())

    def trust(self, client_ca: Path) -> None:
        """Installs another authority of clients."""
        assert self.client_ca is not None
        replace(self.client_ca, client_ca.read_bytes())


def replace(path: Path, content: bytes) -> Path:
    """Replaces a file whole, as tools that renew certificates do."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.rename(path)
    return path
