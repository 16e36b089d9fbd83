import pytest

from tests.benchmarks.capacity import presets
from tests.workplace import PROJECT


def test_the_page_has_the_figures_of_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    presets()
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert f"```\n{printed}\n```" in (PROJECT / "deploy/capacity.md").read_text(encoding="utf-8")
