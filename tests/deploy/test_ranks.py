"""The JobSet and the TrainJob of a run agree with one another, with the worker of the base, and with the code."""

import re
from copy import deepcopy
from typing import Any

import pytest

from tests.deploy.manifests import BASE, KUBERNETES, named, read, selects, workloads
from tests.pages import rows
from trainer_service.ranks.place import DEFAULT_PORT, HOSTS_VARIABLE, INDEX_VARIABLE, find_place
from trainer_service.ranks.rank import FAILED_CODE
from trainer_service.ranks.watchdog import EXIT_CODE

JOBSET = read(KUBERNETES / "jobset/base/jobset.yaml")[0]
RUNTIME = read(KUBERNETES / "trainjob/runtime.yaml")[0]["spec"]["template"]
TRAINJOB = read(KUBERNETES / "trainjob/trainjob.yaml")[0]
POLICIES = {each["metadata"]["name"]: each["spec"] for each in read(KUBERNETES / "ranks/network-policies.yaml")}
PLACEHOLDER = "jobid"


def job(jobset: dict[str, Any]) -> dict[str, Any]:
    """Returns the only Job of a JobSet."""
    (found,) = jobset["spec"]["replicatedJobs"]
    return dict(found)


def pod(jobset: dict[str, Any]) -> dict[str, Any]:
    return deepcopy(dict(job(jobset)["template"]["spec"]["template"]["spec"]))


def hosts(variables: list[dict[str, Any]]) -> list[str]:
    (found,) = (each["value"] for each in variables if each["name"] == HOSTS_VARIABLE)
    return str(found).split(",")


@pytest.mark.parametrize("jobset", [JOBSET, RUNTIME], ids=["jobset", "runtime"])
def test_a_rank_has_the_rights_the_time_and_the_password_of_a_worker(jobset: dict[str, Any]) -> None:
    rank, worker = pod(jobset), dict(workloads()["worker"]["spec"])
    for name in (
        "securityContext",
        "automountServiceAccountToken",
        "enableServiceLinks",
        "terminationGracePeriodSeconds",
    ):
        assert rank[name] == worker[name], name
    (ours,), (theirs,) = rank["containers"], worker["containers"]
    assert ours["securityContext"] == theirs["securityContext"] and ours["image"] == theirs["image"]
    assert [each for each in rank["volumes"] if "secret" in each] == [
        each for each in worker["volumes"] if "secret" in each
    ]
    (account,) = read(KUBERNETES / "ranks/service-account.yaml")
    assert rank["serviceAccountName"] == account["metadata"]["name"]


def test_the_runtime_of_kubeflow_has_the_pods_of_the_jobset() -> None:
    ours, theirs = pod(JOBSET), pod(RUNTIME)
    for each in (ours, theirs):
        (container,) = each["containers"]
        for name in ("name", "command"):
            container.pop(name)
        each["containers"] = [{**container, "env": [one for one in container["env"] if "valueFrom" in one]}]
    assert ours == theirs
    assert JOBSET["spec"]["failurePolicy"] == RUNTIME["spec"]["failurePolicy"]


def test_each_rank_is_named_as_the_cluster_names_its_pod() -> None:
    name, rank = JOBSET["metadata"]["name"], job(JOBSET)
    count = rank["template"]["spec"]["completions"]
    assert count == rank["template"]["spec"]["parallelism"]
    (container,) = pod(JOBSET)["containers"]
    assert hosts(container["env"]) == [f"{name}-{rank['name']}-0-{number}.{name}" for number in range(count)]
    name, trainer = TRAINJOB["metadata"]["name"], TRAINJOB["spec"]["trainer"]
    expected = [f"{name}-{job(RUNTIME)['name']}-0-{number}.{name}" for number in range(trainer["numNodes"])]
    assert hosts(trainer["env"]) == expected
    assert TRAINJOB["spec"]["runtimeRef"]["name"] == read(KUBERNETES / "trainjob/runtime.yaml")[0]["metadata"]["name"]


@pytest.mark.parametrize("variables", [pod(JOBSET)["containers"][0]["env"], TRAINJOB["spec"]["trainer"]["env"]])
def test_each_pod_finds_its_rank_and_where_to_meet(variables: list[dict[str, Any]]) -> None:
    lines = (KUBERNETES / "ranks/ranks.env").read_text(encoding="utf-8").splitlines()
    environment = dict(line.split("=", 1) for line in lines) | {HOSTS_VARIABLE: ",".join(hosts(variables))}
    places = [find_place({**environment, INDEX_VARIABLE: str(rank)}) for rank in range(2)]
    assert [(place.rank, place.count) for place in places] == [(0, 2), (1, 2)]
    assert {place.meeting for place in places} == {(hosts(variables)[0], DEFAULT_PORT)}


def test_ranks_start_whenever_the_cluster_starts_them() -> None:
    for jobset in (JOBSET, RUNTIME):
        assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
        spec = job(jobset)["template"]["spec"]
        # The end of one ends the Job, and so all.
        assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
        assert pod(jobset)["restartPolicy"] == "Never"


def test_a_rank_that_another_attempt_follows_does_not_fail_its_job() -> None:
    for jobset in (JOBSET, RUNTIME):
        failed, moved = job(jobset)["template"]["spec"]["podFailurePolicy"]["rules"]
        assert failed["onExitCodes"]["values"] == [FAILED_CODE] != [EXIT_CODE]
        assert failed["onExitCodes"]["containerName"] == pod(jobset)["containers"][0]["name"]
        assert moved["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        rules = jobset["spec"]["failurePolicy"]["rules"]
        # What Kubernetes writes if a rule of a Job matches an exit code, or a condition.
        by_code = "Container rank for pod gptloop/x failed with exit code 3 matching FailJob rule at index 0"
        by_condition = "Pod gptloop/x has condition DisruptionTarget matching FailJob rule at index 1"
        actions = [_action(rules, message) for message in (by_code, by_condition)]
        assert actions == ["FailJobSet", "RestartJobSetAndIgnoreMaxRestarts"]


def _action(rules: list[dict[str, Any]], message: str) -> str:
    """Returns the action of the first rule that takes a message, as JobSet finds it."""
    taking = (
        rule
        for rule in rules
        if any(re.search(each, message) for each in rule.get("onJobFailureMessagePatterns", [""]))
    )
    return str(next(taking)["action"])


def test_ranks_read_the_variables_that_they_get() -> None:
    variables = set()
    for name in ("ranks/ranks.env", "registry/registry.env"):
        lines = (KUBERNETES / name).read_text(encoding="utf-8").splitlines()
        variables |= {line.partition("=")[0] for line in lines}
    given = {each["name"] for each in pod(JOBSET)["containers"][0]["env"]}
    ours = {name for name in variables | given if not name.startswith("AWS_")}
    assert ours <= {row[0] for row in rows("Settings")}


def test_ranks_reach_one_another_and_redis_and_only_ranks_reach_ranks() -> None:
    labels = job(JOBSET)["template"]["spec"]["template"]["metadata"]["labels"]
    assert labels == job(RUNTIME)["template"]["spec"]["template"]["metadata"]["labels"]
    redis = workloads()["redis"]["metadata"]["labels"]
    ranks = POLICIES["ranks"]
    (source,) = ranks["ingress"]
    for selector in (
        ranks["podSelector"],
        source["from"][0]["podSelector"],
        ranks["egress"][0]["to"][0]["podSelector"],
    ):
        assert selects(selector, labels)
        assert not any(selects(selector, pods["metadata"]["labels"]) for pods in workloads().values())
    assert selects(ranks["egress"][1]["to"][0]["podSelector"], redis)
    inwards = POLICIES["ranks-to-redis"]
    assert selects(inwards["podSelector"], redis)
    assert selects(inwards["ingress"][0]["from"][0]["podSelector"], labels)
    # The name server, as for the others.
    assert ranks["egress"][2] == named(BASE, "NetworkPolicy", "jobs-to-redis-and-dns")["spec"]["egress"][1]


def test_only_the_id_of_the_job_has_to_be_filled_in() -> None:
    assert JOBSET["metadata"]["name"] == TRAINJOB["metadata"]["name"] == f"train-{PLACEHOLDER}"
    assert pod(JOBSET)["containers"][0]["command"][-1] == TRAINJOB["spec"]["trainer"]["command"][-1] == PLACEHOLDER
