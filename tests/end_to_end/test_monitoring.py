"""Every panel, query and rule has data in a real Prometheus that scrapes the real services."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from inference_service.client import AdminClient, Credentials, InferenceClient
from shared.errors import GptloopError
from shared.service.settings import Directories
from tests.end_to_end.conftest import System, is_progress, running
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import spoil_weights
from tests.monitoring import alerts, documented_queries, panels, records
from tests.prometheus import PROGRAM, Prometheus, prometheus
from tests.records import write_record
from tests.token_files import ALICE, OPERATOR, write_tokens
from tests.waiting import HANG_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="prometheus is not installed"),
]


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A system that asks its callers for tokens, and limits its clients."""
    settings = {
        "GPTLOOP_CLIENT_TOKENS": str(write_tokens(tmp_path / "clients", f"alice {ALICE}")),
        "GPTLOOP_OPERATOR_TOKENS": str(write_tokens(tmp_path / "operators", f"olga {OPERATOR}")),
        "GPTLOOP_TOKEN_FILE": str(write_tokens(tmp_path / "own", OPERATOR)),
        "GPTLOOP_INFERENCE_CLIENT_TOKENS_PER_MINUTE": "2000",
    }
    with running(Directories(tmp_path), **settings) as everything:
        yield everything


@contextmanager
def traffic(system: System) -> Iterator[None]:
    """Calls both services inside the block, rightly and wrongly."""
    address, alice = f"127.0.0.1:{system.ports.inference}", Credentials(token=ALICE)
    headers = {"authorization": f"Bearer {ALICE}"}
    done = threading.Event()
    page = f"http://127.0.0.1:{system.ports.inference_http}/v1/completions"

    def call() -> None:
        with (
            InferenceClient(address, credentials=alice) as client,
            httpx.Client(headers=headers, timeout=HANG_S) as http,
        ):
            while not done.is_set():
                with suppress(GptloopError):
                    list(client.generate("Once upon a time", max_tokens=20))
                with suppress(GptloopError):
                    list(client.generate("Once", version=99))
                for prompt in ("Once upon a time", [-1]):
                    with suppress(httpx.TransportError):
                        http.post(page, json={"prompt": prompt, "max_tokens": 8})
                with suppress(GptloopError):
                    system.trainer.jobs()
                done.wait(0.1)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wait_for_data(server: Prometheus, expressions: dict[str, str]) -> None:
    """Waits until every expression has data, and names those that do not get any."""
    deadline_s = time.monotonic() + HANG_S
    while expressions := {name: each for name, each in expressions.items() if not server.has_data(each)}:
        assert time.monotonic() < deadline_s and not server.ended(), f"Without data: {expressions}"
        time.sleep(0.2)


def test_every_panel_query_and_rule_has_data(system: System, tmp_path_factory: pytest.TempPathFactory) -> None:
    ports = system.ports
    targets = {
        "gptloop-inference": f"127.0.0.1:{ports.inference_metrics}",
        "gptloop-training": f"127.0.0.1:{ports.trainer_metrics}",
    }
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets) as server, traffic(system):
        wait_for_data(server, {"both pages": "sum(up) == 2", "before a version": "gptloop_inference_healthy == 0"})
        system.finish(system.enqueue(max_steps="20", evaluation_interval="20"))
        wait_for_data(server, {"a version serves": "gptloop_inference_healthy == 1"})
        # As an evaluation would write it, which takes half a minute.
        write_record(system.registry, system.registry.version(1), 3.8)
        job = system.enqueue(resume=1, max_steps="100000", evaluation_interval="100")
        system.watch(job, is_progress(25))
        shown = {f"{each.dashboard}: {each.title}: {text}": text for each in panels() for text in each.queries}
        wait_for_data(
            server,
            shown | {name: name for name in records()} | {f"queries.md: {each}": each for each in documented_queries()},
        )
        # A version that claims to be the best is refused, and the one that serves is taken back.
        same_text = system.registry.version(1).evaluation_set
        publish_tiny_version(system.registry, 0.0001, evaluation_set=same_text, change=spoil_weights)
        with AdminClient(f"127.0.0.1:{ports.inference}", credentials=system.credentials) as admin:
            admin.roll_back()
        firing = {
            name: f'ALERTS{{alertname="{name}", alertstate="firing"}}'
            for name in ("GptloopVersionRefused", "GptloopRolledBack")
        }
        wait_for_data(server, firing)
        (refused,) = [each for each in server.ask("alerts")["alerts"] if each["labels"]["alertname"] in firing][:1]
        assert targets["gptloop-inference"] in refused["annotations"]["description"]
        rules = [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]
        assert {rule["name"] for rule in rules} == {*alerts(), *records()}
        assert {rule["health"] for rule in rules} == {"ok"}
        instances = server.ask("label/instance/values", **{"match[]": "gptloop_inference_healthy"})
        assert instances == [targets["gptloop-inference"]]
        system.trainer.cancel(job)
        system.end(job)
