import subprocess
import sys

import pytest

from shared.errors import FailedPrecondition
from shared.service import traces


def run(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys\nfrom shared.service import cli, traces\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=settings)


def test_without_the_setting_nothing_is_imported_and_everything_does_nothing() -> None:
    code = """
traces.start("trainer")
with traces.span("a", {"b": 1}) as mark, traces.call("/a/b", [("traceparent", "x")]) as end:
    mark({"c": 2})
    end(None)
    traces.mark({"d": 3})
    traces.add("e", 0.0, 1.0)
assert (traces.ids(), traces.are_on(), traces.wrap(cli)) == ({}, False, cli)
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_setting_without_the_packages_is_refused_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_PACKAGES", ("opentelemetry.absent", "absent"))
    with pytest.raises(FailedPrecondition, match=r"install it with `make \.venv/traces`, or unset the variable"):
        traces.start("trainer", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    assert not traces.are_on()


def test_another_protocol_is_refused() -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
    done = run("cli.end(lambda: traces.start('trainer'))", **settings)
    assert done.returncode == 2
    assert done.stderr == "error: OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json', but must be grpc.\n"
