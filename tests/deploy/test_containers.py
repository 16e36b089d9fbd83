"""What the Dockerfile and the compose files promise, and a rehearsal of all of it with plain processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

import inference_service.settings
import trainer_service.settings
from tests.deploy.builder import DOCKERFILE, is_in_context
from tests.deploy.compose import Service, read_services
from tests.deploy.dockerfile import configuration_of, has_compiler, read_stages
from tests.deploy.manifests import container
from tests.deploy.rehearsal import COMPOSITION, NAMESPACES, SEVERAL
from tests.object_storage.server import is_installed
from tests.pages import rows
from tests.waiting import HANG_S
from tests.workplace import PROJECT

SERVICES = read_services(COMPOSITION, SEVERAL)
DESCRIBED = yaml.safe_load(COMPOSITION.read_text())
OURS = [service for service in SERVICES.values() if service.target]
every_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())


@every_service
def test_a_container_has_no_right_that_it_does_not_need(service: Service) -> None:
    described = DESCRIBED["services"][service.name]
    assert service.is_read_only and described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"] and "privileged" not in described
    assert {"cpus", "memory", "pids"} == set(described["deploy"]["resources"]["limits"])


@every_service
def test_only_the_servers_and_grafana_are_published_and_on_this_machine_only(service: Service) -> None:
    ports = DESCRIBED["services"][service.name].get("ports", [])
    assert bool(ports) == (service.name in ("inference", "inference-2", "grafana"))
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_redis_and_metrics_are_reached_from_their_own_networks_only() -> None:
    internal = {name for name, network in DESCRIBED["networks"].items() if network.get("internal")}
    networks = {name: set(service.get("networks", [])) for name, service in DESCRIBED["services"].items()}
    assert networks["redis"] == {"jobs"} and networks["prometheus"] == {"metrics"}
    assert {"jobs", "metrics", "store"} == internal
    assert not networks["inference"] & networks["redis"] and not networks["grafana"] & networks["redis"]
    assert networks["object-store"] == {"store"}
    with_registry = {name for name, service in SERVICES.items() if "GPTLOOP_REGISTRY" in service.environment}
    assert {name for name in networks if "store" in networks[name]} == {"object-store", *with_registry}


@every_service
def test_a_service_sees_only_the_secrets_that_it_reads(service: Service) -> None:
    seen = {mount.source for mount in service.mounts} & {"tls", "tokens", "redis-password", "grafana-password"}
    expected = {
        "secrets": {"tls", "tokens", "redis-password", "grafana-password"},
        "redis": {"redis-password"},
        "trainer": {"tls", "tokens", "redis-password"},
        "worker": {"redis-password"},
        "worker-2": {"redis-password"},
        "inference": {"tls", "tokens"},
        "inference-2": {"tls", "tokens"},
        "object-store": set[str](),
        "prometheus": set[str](),
        "grafana": {"grafana-password"},
    }
    assert seen == expected[service.name]
    assert all(mount.is_read_only for mount in service.mounts if mount.source in seen) or service.name == "secrets"
    assert service.name == "secrets" or "authority" not in {mount.source for mount in service.mounts}


@pytest.mark.parametrize("service", OURS, ids=lambda service: service.name)
def test_our_services_take_the_variables_that_they_get(service: Service) -> None:
    ours = {name for name in service.environment if not name.startswith("AWS_")}
    assert ours <= {row[0] for row in rows("Settings")}


def test_the_second_of_a_kind_shares_no_state_with_the_first_but_the_store_and_redis() -> None:
    for name in ("worker", "inference"):
        first, second = SERVICES[name], SERVICES[f"{name}-2"]
        assert first.environment == second.environment and first.command == second.command
        changed = {mount.source for mount in second.mounts} ^ {mount.source for mount in first.mounts}
        assert changed == {"state", "state-2"}


def test_nothing_waits_for_the_store_unless_the_profile_is_chosen() -> None:
    assert not [service.name for service in read_services(COMPOSITION).values() if "object-store" in service.needs]
    waiting = {service.name for service in SERVICES.values() if "object-store" in service.needs}
    assert waiting == {service.name for service in SERVICES.values() if "GPTLOOP_REGISTRY" in service.environment}


def test_the_drain_ends_before_the_container_is_killed() -> None:
    assert float(SERVICES["inference"].environment["GPTLOOP_INFERENCE_DRAIN_S"]) + 10 < SERVICES["inference"].stop_s
    # The worker has as long as under `gptloop up`.
    assert SERVICES["worker"].stop_s >= 60


def test_the_published_ports_are_the_defaults_of_the_service() -> None:
    defaults = inference_service.settings.read_settings({})
    ports = [port.removeprefix("127.0.0.1:") for port in DESCRIBED["services"]["inference"]["ports"]]
    assert ports == [f"{port}:{port}" for port in (defaults.port, defaults.http_port)]
    scraped = yaml.safe_load((PROJECT / "deploy/docker/prometheus.yml").read_text())["scrape_configs"]
    trainer = trainer_service.settings.read_settings({})
    assert [target for job in scraped for each in job["static_configs"] for target in each["targets"]] == [
        f"inference:{defaults.metrics_port}",
        f"trainer:{trainer.metrics_port}",
    ]


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    provisioning = PROJECT / "deploy/grafana/provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards/gptloop.yaml").read_text())["providers"]
    mounted = {mount.target: mount.source for mount in SERVICES["grafana"].mounts}
    assert (provider["type"], mounted[provider["options"]["path"]]) == ("file", "./grafana/dashboards")
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["url"] == "http://prometheus:9090"
    for scraped in ("deploy/docker/prometheus.yml", "deploy/prometheus/prometheus.yml"):
        interval = yaml.safe_load((PROJECT / scraped).read_text())["global"]["scrape_interval"]
        assert source["jsonData"]["timeInterval"] == interval


def test_redis_starts_as_in_kubernetes() -> None:
    (script,) = container("redis")["args"]
    command = SERVICES["redis"].command
    assert command is not None and command[-1].split() == script.split()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_without_root_and_without_a_compiler(target: str) -> None:
    stages = read_stages(DOCKERFILE)
    configuration = configuration_of(stages, target, {"PATH": "/bin"})
    assert configuration.user == "10001:10001"
    assert configuration.environment["GPTLOOP_VAR"] == configuration.folder == "/var/lib/gptloop"
    assert not has_compiler(stages, target)
    assert configuration.health[:4] == ["CMD", "python", "-m", "deploy.health"]


def test_the_context_has_what_the_image_is_built_from_and_nothing_of_this_checkout() -> None:
    copied = {
        word
        for stage in read_stages(DOCKERFILE).values()
        for keyword, text in stage.instructions
        if keyword == "COPY" and not text.startswith("--from")
        for word in text.split()[:-1]
    }
    assert copied and all(is_in_context(name) and (PROJECT / name).exists() for name in copied)
    assert not any(is_in_context(name) for name in ("var", ".venv", ".git", "tests", "Makefile", "requirements/lock"))


def test_the_gpu_file_changes_services_that_exist_to_a_target_that_exists() -> None:
    described = yaml.safe_load((PROJECT / "deploy/compose.cuda.yaml").read_text())["services"]
    assert set(described) <= set(SERVICES)
    assert {service["build"]["target"] for service in described.values()} <= set(read_stages(DOCKERFILE))


@pytest.mark.slow
def test_compose_goes_from_nothing_to_a_generated_text(tmp_path: Path) -> None:
    probe = [*NAMESPACES, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("This machine lets this user make no namespaces, so nothing rehearses compose.yaml.")
    command = [sys.executable, "-m", "tests.deploy.rehearsal", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GPTLOOP_", "REDIS_"))}
    ended = subprocess.run(
        [*NAMESPACES, *command], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "wrote over gRPC and HTTPS" in ended.stdout
    assert ("A second worker continued" in ended.stdout) == is_installed()
