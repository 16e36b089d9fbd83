"""The manifests of Kubernetes as values: what their files say before kustomize builds them."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.workplace import PROJECT

KUBERNETES = PROJECT / "deploy" / "kubernetes"
BASE = KUBERNETES / "base"
MONITORING = KUBERNETES / "overlays" / "monitoring"

Resource = dict[str, Any]


@cache
def read(path: Path) -> list[Resource]:
    """Returns the resources in a file."""
    return [resource for resource in yaml.safe_load_all(path.read_text(encoding="utf-8")) if resource]


def resources(folder: Path, kind: str = "") -> list[Resource]:
    """Returns the resources of a folder's kustomization, of one kind if it is given."""
    (kustomization,) = read(folder / "kustomization.yaml")
    files = [folder / name for name in kustomization["resources"] if name.endswith(".yaml")]
    return [each for path in files for each in read(path) if kind in ("", each["kind"])]


def named(folder: Path, kind: str, name: str) -> Resource:
    """Returns a resource."""
    (found,) = (each for each in resources(folder, kind) if each["metadata"]["name"] == name)
    return found


def workloads() -> dict[str, Resource]:
    """Returns the pod templates by name."""
    controllers = [*resources(BASE, "Deployment"), *resources(BASE, "StatefulSet")]
    return {each["metadata"]["name"]: each["spec"]["template"] for each in controllers}


def container(workload: str) -> Resource:
    """Returns the only container of a workload."""
    (found,) = workloads()[workload]["spec"]["containers"]
    return dict(found)


def environment(workload: str) -> dict[str, str]:
    """Returns the environment that the manifests give a workload, with 1 for each limit of its resources."""
    (kustomization,) = read(BASE / "kustomization.yaml")
    files = {each["name"]: each["envs"] for each in kustomization["configMapGenerator"] if "envs" in each}
    seen: dict[str, str] = {}
    for source in container(workload).get("envFrom", ()):
        for name in files[source["configMapRef"]["name"]]:
            lines = (BASE / name).read_text(encoding="utf-8").splitlines()
            seen |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return seen | {each["name"]: each.get("value", "1") for each in container(workload).get("env", ())}


def ports(workload: str) -> dict[str, int]:
    """Returns the ports of a workload by name."""
    return {each["name"]: each["containerPort"] for each in container(workload)["ports"]}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Returns whether the selector of a workload, a policy or a budget selects pods with these labels."""
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", ())
    )


def selected(selector: Mapping[str, Any]) -> set[str]:
    """Returns the names of the workloads whose pods a selector selects."""
    return {name for name, pod in workloads().items() if selects(selector, pod["metadata"]["labels"])}


def mounts(workload: str) -> Iterator[tuple[str, Resource]]:
    """Yields each folder that a workload mounts, with the volume."""
    spec = workloads()[workload]["spec"]
    volumes = {each["name"]: each for each in spec.get("volumes", ())}
    for mount in container(workload)["volumeMounts"]:
        yield mount["mountPath"], volumes.get(mount["name"], {})
