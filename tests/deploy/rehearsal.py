"""Goes from compose.yaml to a generated text without a container engine: `python -m tests.deploy.rehearsal`.

Starts itself again as root of new namespaces, so that its ports, mounts and processes meet no others, and all of them
end with it.
"""

import json
import os
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from inference_service.client import Credentials, InferenceClient
from shared.errors import GptloopError
from tests.deploy.compose import read_services
from tests.deploy.container import start_loopback
from tests.deploy.engine import Engine, address
from tests.waiting import wait_until
from tests.workplace import PROJECT

COMPOSITION = PROJECT / "deploy/compose.yaml"
NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
# A run of some seconds.
_TINY = (
    "vocabulary_size=400 layers=1 width=32 heads=2 hidden_width=64 context_length=64 batch_size=2 max_steps=20 "
    "evaluation_interval=10 evaluation_windows=4 max_train_tokens=40000 warmup_steps=1"
)


# What deploy/docker/README.md writes to deploy/.env.
SEVERAL = {
    "COMPOSE_PROFILES": "several",
    "GPTLOOP_REGISTRY": "s3://gptloop/registry",
    "AWS_ACCESS_KEY_ID": "gptloop",
    "AWS_SECRET_ACCESS_KEY": "the secret key of a rehearsal",
}


def rehearse(folder: Path) -> None:
    start_loopback()
    services = read_services(COMPOSITION, SEVERAL)
    if not Engine.has_programs(services["object-store"]):
        print("The profile `several` is not run, because SeaweedFS is not on this machine.", flush=True)
        services = read_services(COMPOSITION)
    engine = Engine(services, COMPOSITION, folder)
    names = [name for name in services if engine.is_here(name)]
    for name in services.keys() - set(names):
        print(f"{name}: not run, because its programs are not on this machine", flush=True)
    try:
        for name in names:
            engine.start(name)
            if name != "secrets":
                engine.wait(name, "service_healthy")
                print(f"{name}: is healthy", flush=True)
        _check_confinement(engine, names)
        _generate(engine, folder)
        if "inference-2" in names:
            _share(engine, folder)
        if "prometheus" in names:
            wait_until(lambda: _scraped() == {"gptloop-inference": "1", "gptloop-training": "1"})
            print("Prometheus scrapes both services.", flush=True)
        for name in reversed(names):
            if engine.is_running(name):
                code = engine.stop(name)
                assert code == 0, f"{name} ended with {code}:\n{engine.log(name)}"
                print(f"{name}: ended", flush=True)
    except BaseException:
        for name in engine.containers:
            print(f"== the end of the log of {name}\n{engine.log(name)[-3000:]}", flush=True)
        raise


def _check_confinement(engine: Engine, names: list[str]) -> None:
    for name in names:
        container = engine.containers[name]
        if container.process is None or container.process.poll() is not None:
            continue
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{container.process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split()[0] != "0" and status["Gid"].split()[0] != "0"
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"].strip() == "1"
        for place in ("/x", "/usr/x", "/etc/x"):
            assert "Read-only file system" in container.run("touch", place).stderr, (name, place)
    print("No container has a capability or can write its root.", flush=True)


def _generate(engine: Engine, folder: Path) -> None:
    trainer, inference = engine.containers["trainer"], engine.containers["inference"]
    trained = trainer.run("gptloop", "train", "--set", _TINY)
    assert trained.returncode == 0, trained
    wait_until(lambda: "serves" in engine.health("inference").stdout)
    written = inference.run("gptloop", "generate", "--prompt", "Once", "--max-tokens", "8")
    assert written.returncode == 0 and written.stdout.startswith("Once"), written
    # From the machine itself, by the ports that are published.
    authority, token = _access(folder)
    with InferenceClient("localhost:50051", credentials=Credentials(ca=authority, token=token)) as client:
        assert client.complete("Once", max_tokens=4).text
    with InferenceClient("localhost:50051", credentials=Credentials(ca=authority, token="x" * 20)) as client:
        try:
            client.complete("Once", max_tokens=4)
            raise AssertionError("A wrong token was let in.")
        except GptloopError as error:
            print(f"A wrong token: {error}")
    request = urllib.request.Request(
        "https://localhost:8080/v1/completions",
        json.dumps({"prompt": "Once", "max_tokens": 4}).encode(),
        {"authorization": f"Bearer {token}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=authority)) as answer:
        assert json.load(answer)["choices"][0]["text"]
    print("A model was trained, and wrote over gRPC and HTTPS for a client with a token.", flush=True)


def _access(folder: Path) -> tuple[str, str]:
    """Returns the file of the authority, and the token of a client."""
    return str(folder / "volumes/tls/ca.crt"), (folder / "volumes/tokens/clients").read_text().split()[-1]


def _share(engine: Engine, folder: Path) -> None:
    """The second worker continues, without the first one, what that has trained, and both servers follow."""
    assert engine.stop("worker") == 0, engine.log("worker")
    trained = engine.containers["trainer"].run("gptloop", "train", "--resume", "best", "--set", "max_steps=30")
    assert trained.returncode == 0, trained
    authority, token = _access(folder)
    versions = set[int]()
    for name in ("inference", "inference-2"):
        credentials = Credentials(ca=authority, token=token, server_name=name)
        with InferenceClient(f"{address(name)}:50051", credentials=credentials) as client:
            wait_until(lambda client=client: client.model().version > 2)  # type: ignore[misc]
            assert client.complete("Once", max_tokens=4).text
            versions.add(client.model().version)
    assert len(versions) == 1
    print(
        "A second worker continued the best version of the object store, and two servers serve what it made.",
        flush=True,
    )


def _scraped() -> dict[str, str]:
    with urllib.request.urlopen("http://localhost:9090/api/v1/query?query=up") as answer:
        return {each["metric"]["job"]: each["value"][1] for each in json.load(answer)["data"]["result"]}


def main() -> None:
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            again = [*NAMESPACES, sys.executable, "-m", "tests.deploy.rehearsal", folder]
            sys.exit(subprocess.run(again, cwd=PROJECT).returncode)
    os.umask(0o022)
    rehearse(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
