"""The limits of each client, over both faces of a server that is a process of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_service.client import Credentials, InferenceClient
from inference_service.client.completion import FinishReason
from shared.errors import InvalidArgument, ResourceExhausted
from tests.fakes import TINY, publish_tiny_version
from tests.inference_service.process import Server
from tests.token_files import ALICE, BOB, OPERATOR, write_tokens
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

# A stream that outlasts a test.
ENDLESS: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True}


@contextmanager
def limited(folder: Path, **limits: str) -> Iterator[Server]:
    clients = write_tokens(folder / "clients", f"alice {ALICE}", f"bob {BOB}")
    operators = write_tokens(folder / "operators", f"olga {OPERATOR}")
    files = {"GPTLOOP_CLIENT_TOKENS": str(clients), "GPTLOOP_OPERATOR_TOKENS": str(operators)}
    server = Server(folder / "var", **files, **limits)
    try:
        publish_tiny_version(server.registry, 1.0, config=replace(TINY, context_length=1 << 17))
        wait_until(server.serves)
        yield server
    finally:
        assert server.end() == 0, server.lines


def client(server: Server, token: str) -> InferenceClient:
    return InferenceClient(server.address, retries=0, credentials=Credentials(token=token))


def complete(server: Server, token: str, **fields: Any) -> httpx.Response:
    body = {"prompt": "x", "max_tokens": 1, **fields}
    headers = {"authorization": f"Bearer {token}"}
    return httpx.post(f"{server.page_url}v1/completions", json=body, headers=headers, timeout=HANG_S)


def test_the_samples_of_a_client_are_limited_over_both_faces(tmp_path: Path) -> None:
    with limited(tmp_path, GPTLOOP_INFERENCE_CLIENT_STREAMS="2") as server, client(server, ALICE) as alice:
        # Alone, a batch has turns, and more than the limit at once is no request at all.
        assert len(complete(server, ALICE, prompt=["x"] * 5).json()["choices"]) == 5
        assert complete(server, ALICE, n=3).status_code == 400
        with pytest.raises(InvalidArgument, match="n is 3, but must be from 1 to 2, the samples that you may have"):
            alice.complete("x", n=3)
        with alice.generate("x", n=2, **ENDLESS) as stream:
            next(iter(stream))
            with pytest.raises(ResourceExhausted, match="alice has 2 samples already, and 1 more") as refused:
                alice.complete("x", max_tokens=1)
            assert refused.value.retry_after_s == 1.0
            answer = complete(server, ALICE)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert complete(server, BOB).status_code == 200
            assert complete(server, OPERATOR, n=3).status_code == 200
        wait_until(lambda: complete(server, ALICE).status_code == 200)
        assert server.metrics()[("gptloop_inference_client_refusals_total", "alice", "streams")] >= 2
        assert ("gptloop_inference_client_refusals_total", "bob", "streams") not in server.metrics()


def test_a_stream_that_uses_up_the_tokens_goes_on_and_the_next_call_waits(tmp_path: Path) -> None:
    # One token comes back in a minute, so that the test ends long before.
    with limited(tmp_path, GPTLOOP_INFERENCE_CLIENT_TOKENS_PER_MINUTE="1") as server, client(server, ALICE) as alice:
        done = alice.complete("xy", max_tokens=100, ignore_eos=True)
        assert done.samples[0].finish_reason is FinishReason.LENGTH
        # What is missing, and a token more, at a minute each.
        most_s = 102 * 60
        with pytest.raises(ResourceExhausted, match="alice has used its 1 tokens a minute; retry in ") as refused:
            alice.complete("x", max_tokens=1)
        assert refused.value.retry_after_s is not None
        assert 0 < refused.value.retry_after_s <= most_s
        answer = complete(server, ALICE)
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= most_s
        assert complete(server, BOB).status_code == 200
        assert complete(server, OPERATOR, max_tokens=50).status_code == 200
        metrics = server.metrics()
        assert metrics[("gptloop_inference_client_tokens_total", "alice")] == 102
        assert metrics[("gptloop_inference_client_tokens_total", "bob")] == 2
        assert metrics[("gptloop_inference_client_refusals_total", "alice", "tokens")] == 2
        # What says nothing about a text costs nothing.
        assert alice.model().version == 1


def test_whoever_encodes_or_decodes_texts_uses_up_tokens(tmp_path: Path) -> None:
    limits = {"GPTLOOP_INFERENCE_CLIENT_TOKENS_PER_MINUTE": "1", "GPTLOOP_INFERENCE_CLIENT_STREAMS": "1"}
    with limited(tmp_path, **limits) as server, client(server, ALICE) as alice, client(server, BOB) as bob:
        assert alice.tokenize("xyz") == [120, 121, 122]
        assert bob.detokenize([120] * 100) == "x" * 100
        refusal = "has used its 1 tokens a minute"
        with pytest.raises(ResourceExhausted, match=f"alice {refusal}"):
            alice.tokenize("x")
        with pytest.raises(ResourceExhausted, match=f"alice {refusal}"):
            alice.detokenize([120])
        with pytest.raises(ResourceExhausted, match=f"bob {refusal}"):
            bob.complete("x")
        with client(server, OPERATOR) as olga:
            assert olga.tokenize("x") == olga.tokenize("x")
        metrics = server.metrics()
        assert metrics[("gptloop_inference_client_tokens_total", "alice")] == 3
        assert metrics[("gptloop_inference_client_tokens_total", "bob")] == 100
