import shutil
import ssl
import stat
import subprocess
from pathlib import Path

import pytest

import deploy.secrets
from deploy.secrets import main, make_secrets
from shared.errors import FailedPrecondition
from tests.certificates import Authority

NAMES = ["localhost", "inference", "127.0.0.1", "::1"]
MADE = [
    "authority/ca.crt",
    "tls/tls.crt",
    "tokens/clients",
    "tokens/operator",
    "tokens/operators",
    "redis/password",
    "grafana/password",
]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    assert make_secrets(folder, NAMES) == MADE
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_authority_signs_the_certificate_of_all_names(first: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(first / "tls/tls.crt", first / "tls/tls.key")
    for name in NAMES:
        client = ssl.create_default_context(cafile=str(first / "tls/ca.crt"))
        # What a newer Python demands by default.
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        asking = client.wrap_bio(incoming, outgoing, server_hostname=name)
        answering = server.wrap_bio(outgoing, incoming, server_side=True)
        for side in (asking, answering, asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
        assert asking.getpeercert()


def test_what_is_secret_is_the_services_own_and_no_two_are_alike(first: Path) -> None:
    for path in ("authority/ca.key", "tls/tls.key", "tokens/clients", "tokens/operators", "tokens/operator"):
        assert stat.S_IMODE((first / path).stat().st_mode) == 0o400
    made = contents(first)
    assert made["tokens/operator"] == made["tokens/operators"]
    secret = {made[path].split()[-1] for path in ("tokens/clients", "tokens/operator")}
    secret |= {made["redis/password"], made["grafana/password"]}
    assert len(secret) == 4 and all(len(one) >= 32 for one in secret)


def test_what_exists_is_kept(first: Path) -> None:
    before = contents(first)
    for names in (NAMES, ["localhost"], ["LOCALHOST", "0:0:0:0:0:0:0:1"]):
        assert make_secrets(first, names) == []
    assert contents(first) == before


def test_a_certificate_that_lacks_a_name_is_replaced_by_the_same_authority(tmp_path: Path) -> None:
    make_secrets(tmp_path, ["localhost"])
    before = contents(tmp_path)
    names = ["models.example", "10.0.0.1"]
    assert make_secrets(tmp_path, names) == ["tls/tls.crt"]
    after = contents(tmp_path)
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {"tls/tls.crt", "tls/tls.key"}
    assert make_secrets(tmp_path, names) == []
    (tmp_path / "authority/ca.key").unlink()
    assert make_secrets(tmp_path, names) == []
    with pytest.raises(
        FailedPrecondition, match=r"authority/ca\.key is missing, .* certificate in .* for DNS:other\.$"
    ):
        make_secrets(tmp_path, ["other"])
    assert (tmp_path / "tls/tls.crt").read_text() == after["tls/tls.crt"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "two words",
        "a,DNS:b",
        "a" * 64,
        ".".join(["abcdefgh"] * 29),
        "a..b",
        "-a",
        "münchen",
        "10.0.0.300",
        "fe80::1%eth0",
    ],
)
def test_a_name_that_a_certificate_cannot_have_is_refused_before_anything_is_made(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["secrets", str(tmp_path / "secrets"), "localhost", name])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: A name of the certificate is ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_certificate_that_ends_soon_is_replaced_by_the_same_authority(first: Path, tmp_path: Path) -> None:
    make_secrets(tmp_path, NAMES)
    before = contents(tmp_path)
    key, authority = tmp_path / "tls/tls.key", tmp_path / "authority"
    request = subprocess.run(
        ["openssl", "req", "-new", "-key", key, "-subj", "/CN=old"], check=True, capture_output=True
    ).stdout
    signing: list[str | Path] = [
        "openssl",
        "x509",
        "-req",
        "-CA",
        authority / "ca.crt",
        "-CAkey",
        authority / "ca.key",
        "-days",
        "29",
    ]
    signing += ["-CAcreateserial", "-CAserial", tmp_path / "serial"]
    old = subprocess.run(signing, input=request, check=True, capture_output=True).stdout
    (tmp_path / "tls/tls.crt").unlink()
    (tmp_path / "tls/tls.crt").write_bytes(old)
    assert make_secrets(tmp_path, NAMES) == ["tls/tls.crt"]
    after = contents(tmp_path)
    assert after["tls/tls.crt"] != old.decode() and after["tls/tls.key"] != before["tls/tls.key"]
    assert after["tls/ca.crt"] == before["tls/ca.crt"]


def test_a_certificate_that_was_not_finished_is_made_again(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "authority")
    write = deploy.secrets._write

    def die(path: Path, text: str, mode: int) -> None:
        if path.name == "tls.crt":
            raise KeyboardInterrupt
        write(path, text, mode)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(deploy.secrets, "_write", die)
        make_secrets(tmp_path, NAMES)
    assert make_secrets(tmp_path, NAMES) == ["tls/tls.crt"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls/tls.crt", tmp_path / "tls/tls.key")


@pytest.mark.parametrize("expired", [False, True])
def test_the_certificate_of_another_authority_is_left_to_its_owner(tmp_path: Path, expired: bool) -> None:
    make_secrets(tmp_path / "secrets", NAMES)
    own = Authority(tmp_path / "own")
    pair, tls = own.issue("*.example.org", expired=expired), tmp_path / "secrets/tls"
    for name, source in (("tls.crt", pair.certificate), ("tls.key", pair.key), ("ca.crt", own.file)):
        (tls / name).unlink()
        shutil.copy(source, tls / name)
    before = contents(tls)
    assert make_secrets(tmp_path / "secrets", [*NAMES, "more.example.org"]) == []
    assert contents(tls) == before


def test_a_machine_without_openssl_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="openssl is not installed"):
        make_secrets(tmp_path, NAMES)
