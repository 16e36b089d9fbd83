"""The manifests agree with the code and with one another, as far as no validator of `make check` knows it."""

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]

from deploy.make import known_settings
from deploy.stack import Stack
from inference_service import server as inference
from inference_service.settings import Settings
from inference_service.settings import read_settings as read_inference_settings
from shared.service import grpc_server
from tests.deploy.manifests import (
    BASE,
    KUBERNETES,
    MONITORING,
    container,
    environment,
    mounts,
    named,
    ports,
    read,
    resources,
    selected,
    workloads,
)
from tests.workplace import PROJECT
from trainer_service.settings import read_settings as read_trainer_settings

OURS = ("inference", "trainer", "worker")
LISTENING = ("inference", "trainer")
README = (KUBERNETES / "README.md").read_text(encoding="utf-8")
ReadSettings = Callable[[str], Any]
# How long a cluster may need to kill, beyond what the processes need to end.
MARGIN_S = 5.0


def alerts() -> Any:
    return yaml.safe_load((PROJECT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))


@pytest.fixture
def settings_of(tmp_path: Path) -> ReadSettings:
    """Reads the settings of a workload from its environment."""
    (tmp_path / "password").write_text("the-password-of-redis")

    def read(workload: str) -> Any:
        seen = environment(workload)
        if "GPTLOOP_REDIS_PASSWORD_FILE" in seen:
            seen["GPTLOOP_REDIS_PASSWORD_FILE"] = str(tmp_path / "password")
        return (read_inference_settings if workload == "inference" else read_trainer_settings)(seen)

    return read


def test_every_file_is_part_of_a_kustomization() -> None:
    for folder in (BASE, MONITORING):
        (kustomization,) = read(folder / "kustomization.yaml")
        listed = {name for name in kustomization["resources"] if name.endswith(".yaml")}
        other = {"kustomization.yaml", "adapter-values.yaml"}
        assert {path.name for path in folder.glob("*.yaml")} - other == listed


@pytest.mark.parametrize("workload", OURS)
def test_each_process_runs_a_command_that_exists(workload: str) -> None:
    python, flag, package, command = container(workload)["command"]
    assert (python, flag) == ("python", "-m")
    app = import_module(f"{package}.__main__").app
    assert command in typer.main.get_group(app).commands


@pytest.mark.parametrize("workload", OURS)
def test_each_process_reads_its_variables(workload: str, settings_of: ReadSettings) -> None:
    assert set(environment(workload)) <= known_settings()
    settings_of(workload)


@pytest.mark.parametrize("workload", LISTENING)
def test_each_port_is_one_on_which_the_process_listens(workload: str, settings_of: ReadSettings) -> None:
    settings = settings_of(workload)
    listening = {"grpc": settings.port, "metrics": settings.metrics_port, "probe": settings.probe_port}
    if workload == "inference":
        listening["http"] = settings.http_port
    assert ports(workload) == listening


def test_redis_listens_on_the_port_of_its_address() -> None:
    assert ports("redis") == {"redis": 6379}
    assert {environment(workload).get("REDIS_URL") for workload in ("trainer", "worker")} == {
        "redis://gptloop@redis:6379/0"
    }


@pytest.mark.parametrize("service", resources(BASE, "Service"), ids=lambda each: each["metadata"]["name"])
def test_each_service_leads_to_ports_of_its_pods(service: dict[str, Any]) -> None:
    (workload,) = selected({"matchLabels": service["spec"]["selector"]})
    for port in service["spec"]["ports"]:
        assert ports(workload)[port["targetPort"]] == port["port"]


def test_only_ready_replicas_are_named_to_clients_that_choose_among_them() -> None:
    spec = named(BASE, "Service", "inference-replicas")["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is False


def test_every_selector_selects_its_pods() -> None:
    for controller in [*resources(BASE, "Deployment"), *resources(BASE, "StatefulSet")]:
        assert selected(controller["spec"]["selector"]) == {controller["metadata"]["name"]}
    assert selected(named(BASE, "PodDisruptionBudget", "inference")["spec"]["selector"]) == {"inference"}
    for spread in workloads()["inference"]["spec"]["topologySpreadConstraints"]:
        assert selected(spread["labelSelector"]) == {"inference"}


def test_clients_may_call_the_server_by_the_names_of_its_service(settings_of: ReadSettings) -> None:
    name, namespace = "inference", resources(BASE, "Namespace")[0]["metadata"]["name"]
    names = (name, f"{name}.{namespace}", f"{name}.{namespace}.svc", f"{name}.{namespace}.svc.cluster.local")
    assert settings_of("inference").http_hosts == names


# Paths and secrets.


@pytest.mark.parametrize("workload", OURS)
def test_every_path_lies_in_a_mounted_folder(workload: str) -> None:
    folders = {folder for folder, _ in mounts(workload)}
    paths = [PurePosixPath(value) for value in environment(workload).values() if value.startswith("/")]
    assert paths
    for path in paths:
        assert folders & {str(each) for each in (path, *path.parents)}, path


@pytest.mark.parametrize("workload", OURS)
def test_every_file_of_a_secret_is_one_of_its_keys(workload: str) -> None:
    provided = set()
    for folder, volume in mounts(workload):
        if secret := volume.get("secret"):
            keys = [item["path"] for item in secret.get("items", ())] or ["tls.crt", "tls.key", "ca.crt"]
            provided |= {f"{folder}/{key}" for key in keys}
    used = {value for value in environment(workload).values() if value.startswith("/run/secrets/")}
    assert used
    assert used <= provided


@pytest.mark.parametrize("workload", [*OURS, "redis"])
def test_every_secret_is_created_by_a_command_of_the_page(workload: str) -> None:
    for _, volume in mounts(workload):
        if secret := volume.get("secret"):
            (command,) = re.findall(rf"create secret generic {secret['secretName']} ((?:[^\n]*\\\n)*[^\n]*)", README)
            keys = set(re.findall(r"--from-file=(?:([\w.]+)=)", command))
            assert {item["key"] for item in secret.get("items", ())} <= keys


def test_no_secret_is_committed() -> None:
    for path in KUBERNETES.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^kind: Secret$", text, re.MULTILINE), path
        assert "secretGenerator" not in text, path


@pytest.mark.parametrize("workload", [*OURS, "redis"])
def test_files_of_secrets_are_renewed_while_the_process_runs(workload: str) -> None:
    """A cluster never renews a single file that is mounted, nor what environment variables carry."""
    assert not [mount for mount in container(workload)["volumeMounts"] if "subPath" in mount]
    assert "secretKeyRef" not in str(container(workload))
    assert "secretRef" not in str(container(workload))


# Starting, stopping and scaling.


@pytest.mark.parametrize("workload", LISTENING)
def test_probes_ask_for_health_that_the_process_reports(workload: str, settings_of: ReadSettings) -> None:
    probes = {kind: container(workload)[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["grpc"]["port"] for probe in probes.values()} == {settings_of(workload).probe_port}
    services = {kind: probe["grpc"].get("service", "") for kind, probe in probes.items()}
    assert services == {"startup": "liveness", "readiness": "", "liveness": "liveness"}


def test_a_cluster_that_stops_a_replica_waits_for_its_streams(settings_of: ReadSettings) -> None:
    spec = workloads()["inference"]["spec"]
    notice_s = container("inference")["lifecycle"]["preStop"]["sleep"]["seconds"]
    ending_s = grpc_server._NOTICE_S + 2 * grpc_server._CUT_S + grpc_server._GOODBYE_S + inference._LAST_STEP_S
    needed_s = notice_s + settings_of("inference").drain_s + ending_s
    assert spec["terminationGracePeriodSeconds"] >= needed_s + MARGIN_S


def test_a_cluster_that_stops_the_worker_waits_for_the_state_of_its_run() -> None:
    worker_stop_s = inspect.signature(Stack).parameters["worker_stop_s"].default
    assert workloads()["worker"]["spec"]["terminationGracePeriodSeconds"] >= worker_stop_s + MARGIN_S


def test_an_update_never_has_fewer_replicas_than_before() -> None:
    assert named(BASE, "Deployment", "inference")["spec"]["strategy"] == {
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}
    }


def test_replicas_follow_the_waiting_requests() -> None:
    spec = named(BASE, "HorizontalPodAutoscaler", "inference")["spec"]
    target = named(BASE, "Deployment", spec["scaleTargetRef"]["name"])
    assert target["kind"] == spec["scaleTargetRef"]["kind"]
    # A number in the Deployment would undo the autoscaler's at each `kubectl apply`.
    assert "replicas" not in target["spec"]
    assert spec["minReplicas"] >= 2
    (metric,) = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"`{name}`" in (PROJECT / "inference_service/README.md").read_text(encoding="utf-8")
    (values,) = read(MONITORING / "adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert int(metric["pods"]["target"]["averageValue"]) < Settings.slots


# Networks.


def policy(name: str) -> dict[str, Any]:
    return dict(named(BASE, "NetworkPolicy", name)["spec"])


def test_everything_is_denied_first() -> None:
    assert policy("deny-everything") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_the_policies_open_these_ports_and_no_others() -> None:
    opened = {
        (workload, port["port"])
        for each in resources(BASE, "NetworkPolicy")
        for workload in selected(each["spec"]["podSelector"])
        for rule in each["spec"].get("ingress", ())
        for port in rule["ports"]
        if port["port"] in ports(workload).values()
    }
    probes = {(workload, ports(workload)["probe"]) for workload in LISTENING}
    listening = {(workload, port) for workload in (*LISTENING, "redis") for port in ports(workload).values()}
    assert opened == listening - probes


def test_those_with_jobs_reach_redis_and_a_name_server_and_nobody_else_reaches_anything() -> None:
    with_jobs = {workload for workload in OURS if "REDIS_URL" in environment(workload)}
    assert with_jobs == {"trainer", "worker"}
    (calls,) = (each["spec"] for each in resources(BASE, "NetworkPolicy") if "egress" in each["spec"])
    assert selected(calls["podSelector"]) == with_jobs
    redis, names = calls["egress"]
    assert [port["port"] for port in redis["ports"]] == [ports("redis")["redis"]]
    assert {(port["port"], port["protocol"]) for port in names["ports"]} == {(53, "UDP"), (53, "TCP")}
    (source,) = policy("services-to-redis")["ingress"][0]["from"]
    assert selected(source["podSelector"]) == with_jobs


def test_namespaces_of_clients_have_the_labels_that_the_page_gives() -> None:
    for name in ("clients-to-inference", "operators-to-trainer"):
        ((label, value),) = policy(name)["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"].items()
        assert f"{label}={value}" in README


# Monitoring.


def test_each_page_of_metrics_is_scraped_once_under_the_job_of_the_rules() -> None:
    scraped = {}
    for monitor in resources(MONITORING, "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        labels = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = (
            each
            for each in resources(BASE, "Service")
            if labels <= each["metadata"].get("labels", {}).items()
            and endpoint["port"] in [port["name"] for port in each["spec"]["ports"]]
        )
        (workload,) = selected({"matchLabels": service["spec"]["selector"]})
        (relabeling,) = endpoint["relabelings"]
        assert relabeling["targetLabel"] == "job"
        scraped[relabeling["replacement"]] = ports(workload)[endpoint["port"]]
    configured = yaml.safe_load((PROJECT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    jobs = {each["job_name"]: each["static_configs"][0]["targets"][0] for each in configured["scrape_configs"]}
    assert {job: int(target.rpartition(":")[2]) for job, target in jobs.items()} == scraped


def test_the_alerts_are_those_of_prometheus() -> None:
    (rule,) = resources(MONITORING, "PrometheusRule")
    assert rule["spec"] == alerts(), "The head of alerts.yaml says how to write it again."


def test_every_file_on_the_page_exists() -> None:
    for name in re.findall(r"(?<![\w/.])(deploy/kubernetes/[\w./-]+)", README):
        assert (PROJECT / Path(name)).exists(), name
