from pathlib import Path

import pytest

from shared.errors import InvalidArgument
from shared.service.access import credentials as credentials_module
from shared.service.access.credentials import Credentials, read_credentials
from shared.service.access.pem import PemFile
from tests.certificates import Authority, replace

TOKEN = "a-token-of-a-client"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def test_without_settings_there_is_neither_tls_nor_a_token() -> None:
    credentials = read_credentials({})
    assert credentials == Credentials()
    assert credentials.to_channel_credentials() is None
    assert credentials.to_metadata() == ()


def test_every_setting_is_read(authority: Authority, tmp_path: Path) -> None:
    own = authority.issue("client")
    file = replace(tmp_path / "token", f"# mine\n\nme {TOKEN}\n".encode())
    credentials = read_credentials(
        {
            "GPTLOOP_TLS_CA": f" {authority.file}\n",
            "GPTLOOP_TLS_CLIENT_CERT": str(own.certificate),
            "GPTLOOP_TLS_CLIENT_KEY": str(own.key),
            "GPTLOOP_TLS_SERVER_NAME": "models.example",
            "GPTLOOP_TOKEN_FILE": str(file),
        }
    )
    assert credentials == Credentials(
        str(authority.file), str(own.certificate), str(own.key), "models.example", token=TOKEN
    )
    assert credentials.to_channel_credentials() is not None
    assert credentials.to_metadata() == (("authorization", f"Bearer {TOKEN}"),)


def test_the_system_may_say_whom_to_trust() -> None:
    assert Credentials(ca="system").to_channel_credentials() is not None


def test_each_file_is_read_once(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    own = authority.issue("client")
    paths, read = [], PemFile.read

    def reading(file: PemFile) -> bytes:
        paths.append(file.path)
        return read(file)

    def of_the_system() -> None:
        paths.append(Path("system"))

    monkeypatch.setattr(PemFile, "read", reading)
    monkeypatch.setattr(credentials_module, "_system_authorities", of_the_system)
    Credentials(authority.file, own.certificate, own.key).to_channel_credentials()
    assert paths == [authority.file, own.certificate, own.key]


def test_the_token_shows_nowhere() -> None:
    credentials = Credentials(token=TOKEN)
    assert TOKEN not in repr(credentials)
    assert TOKEN not in str(credentials)


@pytest.mark.parametrize("content", ["", "# nothing\n", "a b c\n", f"{TOKEN}\n{TOKEN}\n", "me öffne-dich\n"])
def test_a_file_without_one_token_is_refused_without_its_content(tmp_path: Path, content: str) -> None:
    file = replace(tmp_path / "token", content.encode())
    with pytest.raises(InvalidArgument) as refused:
        read_credentials({"GPTLOOP_TOKEN_FILE": str(file)})
    assert "GPTLOOP_TOKEN_FILE" in str(refused.value)
    assert not any(word in str(refused.value) for word in (TOKEN, "dich", "a b c"))


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    absent, binary = tmp_path / "absent", replace(tmp_path / "binary", b"\xff\xfe")
    for file, reason in ((absent, "No such file or directory"), (binary, "it is not UTF-8 text")):
        with pytest.raises(InvalidArgument) as refused:
            read_credentials({"GPTLOOP_TOKEN_FILE": str(file)})
        assert str(refused.value) == f"GPTLOOP_TOKEN_FILE is '{file}', which cannot be read: {reason}."


def test_each_setting_that_cannot_be_used_is_named(authority: Authority, tmp_path: Path) -> None:
    own, other = authority.issue("client"), authority.issue("other")
    nothing, ca = str(replace(tmp_path / "nothing", b"nothing")), str(authority.file)
    certificate, key = str(own.certificate), str(own.key)
    for given, sentence in (
        ({"CA": str(tmp_path / "absent")}, f"CA is '{tmp_path / 'absent'}', which cannot be read: No such file"),
        ({"CA": nothing}, f"CA is '{nothing}', which contains no certificates in PEM form."),
        ({"CLIENT_CERT": certificate, "CLIENT_KEY": key}, "CLIENT_CERT is set, but not GPTLOOP_TLS_CA, without which"),
        ({"SERVER_NAME": "models.example"}, "SERVER_NAME is set, but not GPTLOOP_TLS_CA, without which"),
        ({"CA": ca, "CLIENT_CERT": certificate}, "CLIENT_CERT is set, but not GPTLOOP_TLS_CLIENT_KEY; a client needs"),
        ({"CA": ca, "CLIENT_KEY": key}, "CLIENT_KEY is set, but not GPTLOOP_TLS_CLIENT_CERT; a client needs both"),
        ({"CA": ca, "CLIENT_CERT": nothing, "CLIENT_KEY": key}, f"CLIENT_CERT is '{nothing}', which contains no cert"),
        (
            {"CA": ca, "CLIENT_CERT": certificate, "CLIENT_KEY": str(other.key)},
            f"CLIENT_KEY is '{other.key}', which is not the key of the certificate in GPTLOOP_TLS_CLIENT_CERT.",
        ),
    ):
        with pytest.raises(InvalidArgument) as refused:
            read_credentials({f"GPTLOOP_TLS_{name}": value for name, value in given.items()})
        assert str(refused.value).startswith(f"GPTLOOP_TLS_{sentence}")


def test_in_python_the_parameter_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^ca is '.*absent', which cannot be read"):
        Credentials(ca=tmp_path / "absent").to_channel_credentials()
    with pytest.raises(InvalidArgument, match=r"^server_name is set, but not ca, without which"):
        Credentials(server_name="models.example").to_channel_credentials()
