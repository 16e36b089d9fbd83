from pathlib import Path

import pytest

from deploy.access import check_access, own_credentials, with_absolute_paths
from deploy.health import health_checks
from deploy.ports import free_ports, page_url
from deploy.services.installation import read_installation
from shared.errors import FailedPrecondition, InvalidArgument
from shared.service import traces
from shared.service.settings import Directories
from tests.certificates import Authority, Installed


def test_without_tls_commands_need_nothing() -> None:
    check_access({})
    assert own_credentials({}).ca is None


def test_with_tls_commands_need_the_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    environment = Installed(tmp_path / "server", authority.issue("127.0.0.1")).environment
    sentence = r"^GPTLOOP_TLS_CERT is set, but not GPTLOOP_TLS_CA, without which this command cannot reach the servers"
    with pytest.raises(InvalidArgument, match=sentence):
        check_access(environment)
    # `gptloop down` and `gptloop status` work all the same.
    health = health_checks(environment, Directories(tmp_path), free_ports())["trainer"]()
    assert not health.is_healthy
    assert health.text.startswith("GPTLOOP_TLS_CERT is set, but not GPTLOOP_TLS_CA")
    environment["GPTLOOP_TLS_CA"] = str(authority.file)
    check_access(environment)
    assert own_credentials(environment).ca == str(authority.file)
    assert page_url(environment, free_ports()).startswith("https://127.0.0.1:")


def test_commands_need_a_certificate_if_clients_must_have_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    environment = Installed(tmp_path / "server", authority.issue("127.0.0.1"), authority.file).environment
    environment["GPTLOOP_TLS_CA"] = str(authority.file)
    sentence = r"^GPTLOOP_TLS_CLIENT_CA is set, but not GPTLOOP_TLS_CLIENT_CERT and GPTLOOP_TLS_CLIENT_KEY, without"
    with pytest.raises(InvalidArgument, match=sentence):
        check_access(environment)
    own = authority.issue("operator")
    check_access(
        environment | {"GPTLOOP_TLS_CLIENT_CERT": str(own.certificate), "GPTLOOP_TLS_CLIENT_KEY": str(own.key)}
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"GPTLOOP_TLS_CERT": "absent", "GPTLOOP_TLS_KEY": "absent"},
            r"^GPTLOOP_TLS_CERT is 'absent', which cannot be",
        ),
        ({"GPTLOOP_INFERENCE_HOST": "0.0.0.0"}, r"^GPTLOOP_INFERENCE_HOST is '0\.0\.0\.0', which other machines can"),
        ({"GPTLOOP_TRAINER_HOST": "0.0.0.0"}, r"^GPTLOOP_TRAINER_HOST is '0\.0\.0\.0', .* GPTLOOP_OPERATOR_TOKENS any"),
    ],
)
def test_what_a_service_would_refuse_is_refused_before_it_starts(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        check_access(settings)
    if "GPTLOOP_TLS_CERT" not in settings:
        check_access(settings | {"GPTLOOP_INSECURE": "1"})


def test_traces_without_their_packages_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_PACKAGES", ("absent",))
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    for check in (check_access, read_installation):
        with pytest.raises(FailedPrecondition, match=r"OpenTelemetry is not installed: install it with `make"):
            check(settings)


def test_paths_become_absolute_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ("GPTLOOP_TLS_CERT", "GPTLOOP_TLS_CLIENT_CA", "GPTLOOP_CLIENT_TOKENS", "GPTLOOP_TOKEN_FILE")
    others = {
        "GPTLOOP_TLS_CA": "system",
        "GPTLOOP_TLS_KEY": "",
        "GPTLOOP_TLS_SERVER_NAME": "models.example",
        "GPTLOOP_INFERENCE_PORT": "1",
        "GPTLOOP_INFERENCE_PREFIX_CACHE_MIB": "64",
        "GPTLOOP_INFERENCE_PREFILL_TOKENS": "64",
        "GPTLOOP_INFERENCE_CLIENT_TOKENS_PER_MINUTE": "2000",
        "SSL_CERT_FILE": "relative.pem",
    }
    expected = {name: str(tmp_path / "a" / "b") for name in paths} | others
    assert with_absolute_paths(dict.fromkeys(paths, " a/b ") | others) == expected
