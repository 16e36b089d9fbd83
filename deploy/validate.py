"""Validates the files that other programs read: `python -m deploy.validate [NAME …]`, in the project's folder.

`make .venv/validators` installs the programs, except promtool, which comes with Prometheus. A validator without its
program is named as not run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = Path(sys.prefix) / "validators" / "bin"


@dataclass(frozen=True)
class Validator:
    """A line of bash that fails if the files of the project are wrong, and the programs that it needs.

    `$folder` is an empty folder that is removed afterwards.
    """

    name: str
    programs: tuple[str, ...]
    command: str


# Writes what a cluster would get to `$folder`, a file for each resource; `_FOREIGN` are those that others define.
_BUILD = (
    "for overlay in overlays/{cpu,cuda,object-storage,monitoring} jobset/{ring,nccl} trainjob; do "
    'mkdir -p "$folder/$overlay"; kubectl kustomize deploy/kubernetes/$overlay --output "$folder/$overlay"; done'
)
_FOREIGN = r"\( -name 'monitoring.coreos.com*' -o -name 'jobset.x-k8s.io*' -o -name 'trainer.kubeflow.org*' \)"
_OURS = f"$(find . -name '*.yaml' ! {_FOREIGN})"
# It passes what it does not find, and in folders it finds nothing whose path has a hidden part, as that of $folder may.
_CHECKOV = "checkov --skip-download --quiet --compact"
_HAS_CHECKED = ' | tee "$folder/said"; grep --quiet "Passed checks: [1-9]" "$folder/said"'
_MONITORING = "deploy/kubernetes/overlays/monitoring"
_SCHEMAS = "deploy/kubernetes/schemas"

VALIDATORS = (
    Validator("contracts", ("buf",), "buf lint proto"),
    # Clients of the last release understand this one, which may have a tag already: tags of this commit are left out.
    Validator(
        "contracts-kept",
        ("buf", "git"),
        "if tag=$(git describe --tags --abbrev=0 HEAD^ 2> /dev/null); "
        'then buf breaking proto --against ".git#tag=$tag,subdir=proto"; else echo "Not run: no earlier tag."; fi',
    ),
    Validator(
        "image",
        ("hadolint", "checkov"),
        "hadolint deploy/docker/Dockerfile && "
        # It does not resolve the argument that names the base image.
        f"{_CHECKOV} --framework dockerfile --skip-check CKV_DOCKER_7 --file deploy/docker/Dockerfile{_HAS_CHECKED}",
    ),
    Validator(
        "compose",
        ("check-jsonschema",),
        "check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml deploy/compose.cuda.yaml",
    ),
    # It checks the rules that a configuration names, too.
    Validator(
        "prometheus",
        ("promtool",),
        "promtool check config deploy/prometheus/prometheus.yml deploy/docker/prometheus.yml",
    ),
    Validator("alerts", ("promtool",), "promtool test rules deploy/prometheus/alerts_test.yml"),
    # It runs shellcheck on the commands of the steps.
    Validator("workflows", ("actionlint", "shellcheck"), "actionlint .github/workflows/*.yml"),
    Validator(
        "kubernetes",
        ("kubectl", "kubernetes-validate"),
        # A resource without a schema is only a warning for it.
        f'{_BUILD}; cd "$folder"; kubernetes-validate --strict --quiet {_OURS} | tee found; test ! -s found',
    ),
    Validator(
        "prometheus-operator",
        ("check-jsonschema",),
        f"check-jsonschema --schemafile {_SCHEMAS}/service-monitor.json {_MONITORING}/*-monitor.yaml; "
        f"check-jsonschema --schemafile {_SCHEMAS}/prometheus-rule.json {_MONITORING}/alerts.yaml",
    ),
    Validator(
        "kubernetes-runs",
        ("kubectl", "check-jsonschema"),
        f"{_BUILD}; "
        + "; ".join(
            f'check-jsonschema --schemafile {_SCHEMAS}/{schema}.json "$folder"/{files}'
            for schema, files in (
                ("jobset", "jobset/*/jobset.x-k8s.io*"),
                ("training-runtime", "trainjob/trainer.kubeflow.org*_trainingruntime_*"),
                ("train-job", "trainjob/trainer.kubeflow.org*_trainjob_*"),
            )
        ),
    ),
    Validator(
        "kubernetes-policies",
        ("kubectl", "checkov"),
        f'{_BUILD}; policies=$PWD/deploy/kubernetes/checkov.yaml; cd "$folder"; '
        f'{_CHECKOV} --config-file "$policies" --file {_OURS}{_HAS_CHECKED}',
    ),
    Validator(
        "envoy",
        ("envoy",),
        'cp deploy/envoy/*.yaml "$folder"; sed -i "s#/etc/envoy/#$folder/#" "$folder/envoy.yaml"; '
        'envoy --mode validate --log-level warning --config-path "$folder/envoy.yaml"',
    ),
    Validator(
        "shell",
        ("shellcheck",),
        "shellcheck .ci/run requirements/install requirements/lock deploy/slurm/train.sbatch tests/emulate_arm64",
    ),
)


def missing_program(validator: Validator) -> str | None:
    """Returns a program that the validator needs and that is not installed."""
    return next((name for name in validator.programs if shutil.which(name, path=_search_path()) is None), None)


def passes(validator: Validator, root: Path) -> bool:
    """Runs a validator on the files below `root`, prints what it says, and returns whether they are right."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PATH": _search_path(), "folder": folder}
        command = ["bash", "-euo", "pipefail", "-c", validator.command]
        return subprocess.run(command, cwd=root, env=environment, stdin=subprocess.DEVNULL).returncode == 0


def _search_path() -> str:
    return os.pathsep.join([str(_PROGRAMS), os.environ["PATH"]])


def main(names: list[str]) -> int:
    """Runs the named validators, or all, and returns the exit status: 1 if one of them finds a fault."""
    unknown = set(names) - {validator.name for validator in VALIDATORS}
    if unknown:
        known = ", ".join(validator.name for validator in VALIDATORS)
        print(f"error: There is no validator {min(unknown)!r}; the validators are {known}.", file=sys.stderr)
        return 2
    failed = []
    for validator in VALIDATORS:
        if names and validator.name not in names:
            continue
        if program := missing_program(validator):
            print(f"{validator.name}: not run, because {program} is not installed.", flush=True)
            continue
        print(f"{validator.name}: {validator.command}", flush=True)
        if not passes(validator, Path.cwd()):
            failed.append(validator.name)
    if failed:
        print(f"error: Faults were found by: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
