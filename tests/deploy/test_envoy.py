"""The configuration of Envoy agrees with the services; `tests.soak.replicas` runs it."""

from typing import Any

import yaml  # type: ignore[import-untyped]

from inference_service.server import SERVICE
from inference_service.settings import Settings
from tests.deploy.manifests import BASE, named, resources
from tests.workplace import PROJECT


def configuration() -> Any:
    text = (PROJECT / "deploy/envoy/envoy.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["static_resources"]


def routes() -> Any:
    ((chain,),) = (listener["filter_chains"] for listener in configuration()["listeners"])
    (manager,) = chain["filters"]
    (host,) = manager["typed_config"]["route_config"]["virtual_hosts"]
    return host["routes"]


def test_only_calls_that_change_nothing_are_sent_again_after_a_refusal() -> None:
    repeated, others = routes()
    assert repeated["match"] == {"prefix": f"/{SERVICE}/"}
    assert "unavailable" in repeated["route"]["retry_policy"]["retry_on"]
    assert others["match"] == {"prefix": "/"}
    # Neither has reached a replica's code.
    assert others["route"]["retry_policy"]["retry_on"] == "connect-failure,refused-stream"


def test_a_client_cannot_shut_out_others_by_calls_that_the_only_replica_ends() -> None:
    # A short deadline, which ends a call as 504, is enough to eject a replica for a second.
    (cluster,) = configuration()["clusters"]
    detection = cluster["outlier_detection"]
    assert detection["max_ejection_percent"] <= 50
    assert not detection.get("always_eject_one_host", False)


def test_it_adds_no_deadline_of_its_own() -> None:
    assert {route["route"]["timeout"] for route in routes()} == {"0s"}


def test_it_looks_for_replicas_where_a_cluster_names_them() -> None:
    (cluster,) = configuration()["clusters"]
    ((endpoint,),) = (each["lb_endpoints"] for each in cluster["load_assignment"]["endpoints"])
    address = endpoint["endpoint"]["address"]["socket_address"]
    service = named(BASE, "Service", "inference-replicas")
    (namespace,) = resources(BASE, "Namespace")
    assert address == {
        "address": f"{service['metadata']['name']}.{namespace['metadata']['name']}.svc.cluster.local",
        "port_value": Settings.port,
    }
