"""Each validator of `make check` finds a fault that is planted into a copy of the files it reads."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy import validate
from deploy.validate import VALIDATORS, missing_program, passes
from tests.workplace import PROJECT

# All that validators read.
READ = (".ci", ".github", "deploy", "proto", "requirements")


@dataclass(frozen=True)
class Fault:
    """A text in a file that is replaced, and words of the validator's answer."""

    validator: str
    file: str
    text: str
    replacement: str
    answer: str


_BASE = "deploy/kubernetes/base"
_MONITORING = "deploy/kubernetes/overlays/monitoring"

FAULTS = (
    Fault("contracts", "proto/inference/v1/inference.proto", "rpc Generate(", "rpc generate(", "PascalCase"),
    Fault("contracts-kept", "proto/inference/v1/inference.proto", "rpc Generate(", "rpc Continue(", 'RPC "Generate"'),
    Fault("prometheus", "deploy/prometheus/prometheus.yml", "scrape_interval:", "scrape_intervall:", "not found"),
    Fault("prometheus", "deploy/prometheus/alerts.yml", "sum(gptloop", "summ(gptloop", "unknown function"),
    Fault("alerts", "deploy/prometheus/alerts.yml", "time() - gptloop", "0 * gptloop", "FAILED"),
    Fault(
        "workflows", ".github/workflows/check.yml", "runner: macos-15", "runner: macos-1", 'label "macos-1" is unknown'
    ),
    Fault("workflows", ".github/workflows/release.yml", '"$name-cuda-amd64"', "$name-cuda-amd64", "SC2086"),
    Fault("kubernetes", f"{_BASE}/kustomization.yaml", "- worker.yaml", "- workers.yaml", "workers.yaml"),
    Fault("kubernetes", f"{_BASE}/inference.yaml", "periodSeconds:", "periodSecond:", "periodSecond"),
    Fault("kubernetes", f"{_BASE}/trainer.yaml", "kind: Deployment", "kind: Deploymnt", "Deploymnt"),
    Fault("prometheus-operator", f"{_MONITORING}/inference-monitor.yaml", "interval: 5s", "interval: 5", "interval"),
    Fault("prometheus-operator", f"{_MONITORING}/alerts.yaml", "expr:", "expression:", "expression"),
    Fault("kubernetes", "deploy/kubernetes/ranks/network-policies.yaml", "port: 443", "prt: 443", "prt"),
    Fault("kubernetes-runs", "deploy/kubernetes/jobset/base/jobset.yaml", "Restarts: 10", "Restart: 10", "maxRestart"),
    Fault("kubernetes-runs", "deploy/kubernetes/trainjob/runtime.yaml", "numNodes: 1", "numNodes: one", "numNodes"),
    Fault("kubernetes-runs", "deploy/kubernetes/trainjob/trainjob.yaml", "runtimeRef:", "runtimRef:", "runtimeRef"),
    Fault("kubernetes-policies", f"{_BASE}/redis.yaml", "drop: [ALL]", "drop: []", "CKV_K8S_37"),
    Fault("envoy", "deploy/envoy/envoy.yaml", "LEAST_REQUEST", "LEAST_REQUESTS", "LEAST_REQUESTS"),
    Fault("image", "deploy/docker/Dockerfile", " && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
    Fault("image", "deploy/docker/Dockerfile", "\nUSER 10001:10001\n", "\n", "CKV_DOCKER_3"),
    Fault("compose", "deploy/compose.yaml", "  worker-2:\n", "  worker-2:\n    imagine: a word\n", "imagine"),
    Fault("prometheus", "deploy/docker/prometheus.yml", "static_configs:", "static_config:", "not found"),
    Fault("shell", "requirements/install", 'tail -n 20 "$log"', "tail -n 20 $missing", "SC2154"),
    Fault("shell", "deploy/slurm/train.sbatch", 'kill -TERM "$ranks"', "kill -TERM $job", "SC2154"),
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in READ:
        if (PROJECT / name).exists():
            shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def commit(folder: Path, tag: str) -> None:
    """Commits the contracts in a folder, and gives the commit a tag."""
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    for words in (
        ("init", "--quiet"),
        ("add", "proto"),
        (*who, "commit", "--quiet", "--allow-empty", "-m", tag),
        ("tag", tag),
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)


def test_every_validator_has_a_planted_fault() -> None:
    assert {fault.validator for fault in FAULTS} == {validator.name for validator in VALIDATORS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.validator}-{Path(fault.file).name}")
def test_a_planted_fault_is_found(fault: Fault, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    validator = next(each for each in VALIDATORS if each.name == fault.validator)
    if program := missing_program(validator):
        pytest.skip(f"{program} is not installed: make .venv/validators")
    commit(files, "v1")
    text = (files / fault.file).read_text(encoding="utf-8")
    assert fault.text in text
    (files / fault.file).write_text(text.replace(fault.text, fault.replacement), encoding="utf-8")
    commit(files, "v2")
    assert not passes(validator, files)
    assert fault.answer in "".join(capfd.readouterr())


def test_contracts_are_compared_with_an_earlier_tag(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    validator = next(each for each in VALIDATORS if each.name == "contracts-kept")
    if program := missing_program(validator):
        pytest.skip(f"{program} is not installed: make .venv/validators")
    assert passes(validator, files) and "Not run: no earlier tag." in capfd.readouterr().out
    commit(files, "v1")
    assert passes(validator, files) and "Not run: no earlier tag." in capfd.readouterr().out
    commit(files, "v2")
    assert passes(validator, files) and "Not run" not in capfd.readouterr().out


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(validate, "_search_path", lambda: "")
    assert validate.main([]) == 0
    assert "contracts: not run, because buf is not installed." in capsys.readouterr().out


def test_an_unknown_validator_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["contract"]) == 2
    assert "error: There is no validator 'contract'; the validators are contracts, " in capsys.readouterr().err
