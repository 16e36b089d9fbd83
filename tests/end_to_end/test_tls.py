"""Everything with TLS, and clients that need a certificate, as `gptloop up` starts it."""

import time
from pathlib import Path

import pytest

from deploy.ports import page_url
from shared.errors import Unavailable
from shared.service.settings import Directories
from tests.certificates import Authority, Installed
from tests.end_to_end.conftest import running
from trainer_service.client import TrainerClient

pytestmark = pytest.mark.slow


def test_a_version_is_trained_and_served_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca")
    installed, own = Installed(tmp_path / "server", authority.issue("127.0.0.1"), authority.file), authority.issue("me")
    # The processes run in another folder than the commands, for which paths are relative.
    monkeypatch.chdir(tmp_path)
    settings = {
        **installed.environment,
        "GPTLOOP_TLS_CA": str(authority.file),
        "GPTLOOP_TLS_CLIENT_CERT": str(own.certificate),
        "GPTLOOP_TLS_CLIENT_KEY": str(own.key),
    }
    settings = {name: str(Path(path).relative_to(tmp_path)) for name, path in settings.items()}
    (tmp_path / "var").mkdir()
    with running(Directories(tmp_path / "var"), **settings) as system:
        system.finish(system.enqueue(max_steps="20", evaluation_interval="20"))
        with system.client() as client:
            assert client.complete("Once", max_tokens=4).version == 1
        monkeypatch.setattr("tests.end_to_end.conftest.PROJECT", tmp_path)
        for command in (("status",), ("versions",), ("generate", "--prompt", "Once", "--max-tokens", "4")):
            done = system.command("deploy.cli", *command)
            assert (done.returncode, "not" in done.stderr) == (0, False), done.stderr
        assert page_url(system.environment, system.ports).startswith("https://127.0.0.1:")
        for service, port in (
            ("inference", system.ports.inference_metrics),
            ("training", system.ports.trainer_metrics),
        ):
            _, samples = system.scrape(port)
            assert samples[f"gptloop_{service}_tls_certificate_expiry_timestamp_seconds"] > time.time()
        with (
            TrainerClient(f"127.0.0.1:{system.ports.trainer}") as stranger,
            pytest.raises(Unavailable, match="closed the connection before any call"),
        ):
            next(stranger.jobs())
