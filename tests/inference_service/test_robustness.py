"""What clients get from a server that is full, slow, broken or stopping: real processes, real calls."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inference_service.client import InferenceClient
from inference_service.client.stream import Stream
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.fakes import TINY, publish_tiny_version
from tests.inference_service.process import BREAKABLE, SERVE, SMALL_WINDOW, Server, text_of
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

# Enough context for a stream of several seconds.
LONG = replace(TINY, context_length=16384)


def start(var: Path, command: Sequence[str] = SERVE, **settings: float) -> Server:
    server = Server(var, command, **{f"GPTLOOP_INFERENCE_{name}": str(value) for name, value in settings.items()})
    publish_tiny_version(server.registry, 1.0, config=LONG)
    wait_until(server.serves)
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two slots and room for two waiting requests, which soon ends streams of slow readers."""
    server = start(
        tmp_path_factory.mktemp("server") / "var", SLOTS=2, MAX_WAITING_REQUESTS=2, SLOW_READER_S=1, DRAIN_S=1
    )
    try:
        yield server
    finally:
        assert server.end() == 0, server.lines
        assert "Traceback" not in "".join(server.lines), server.lines


@pytest.fixture
def client(server: Server) -> Iterator[InferenceClient]:
    with InferenceClient(server.address, retries=0) as client:
        yield client
    wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 0)
    assert server.metrics()["gptloop_inference_waiting_requests",] == 0


def long(client: InferenceClient) -> Stream:
    """Starts a stream of several seconds; it gets no event while it waits for a slot."""
    return client.generate("Once", max_tokens=16000, ignore_eos=True)


def until_waiting(server: Server, requests: int) -> None:
    wait_until(lambda: server.metrics()["gptloop_inference_waiting_requests",] == requests)


def endless(client: InferenceClient) -> Stream:
    """Starts such a stream and waits for its first event."""
    stream = long(client)
    assert isinstance(next(stream), pb.Started)
    return stream


def test_each_sample_equals_a_request_with_its_seed(client: InferenceClient) -> None:
    texts = {0: "", 1: ""}
    ends = []
    for event in client.generate("Once", n=2, seed=2**64 - 1, max_tokens=40):
        if isinstance(event, pb.Delta):
            texts[event.index] += event.text
        elif isinstance(event, pb.Finished):
            ends.append(event.index)
    assert sorted(ends) == [0, 1]
    assert texts[0] == text_of(client.generate("Once", seed=2**64 - 1, max_tokens=40))
    assert texts[1] == text_of(client.generate("Once", seed=0, max_tokens=40)) != texts[0]


def test_a_full_queue_rejects_requests_with_a_retry_time(server: Server, client: InferenceClient) -> None:
    running = [endless(client) for _ in range(2)]
    wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 2)
    waiting = [long(client) for _ in range(2)]
    until_waiting(server, 2)
    with pytest.raises(errors.ResourceExhausted, match="2 requests are waiting already") as rejected:
        list(client.generate("x"))
    assert rejected.value.retry_after_s is not None and rejected.value.retry_after_s > 0
    assert server.metrics()["gptloop_inference_requests_total", "resource_exhausted"] >= 1
    for stream in (*running, *waiting):
        stream.cancel()


def test_waiting_prompt_tokens_are_limited(tmp_path: Path) -> None:
    server = start(tmp_path / "var", SLOTS=2, MAX_WAITING_PROMPT_TOKENS=50)
    try:
        with InferenceClient(server.address, retries=0) as client:
            # A prompt beyond the limit is accepted if nothing else waits.
            list(client.generate("x" * 60, max_tokens=1))
            running = [endless(client) for _ in range(2)]
            wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 2)
            waiting = long(client)
            until_waiting(server, 1)
            sentence = "4 prompt tokens are waiting already, and 60 more"
            with pytest.raises(errors.ResourceExhausted, match=sentence) as rejected:
                list(client.generate("x" * 60))
            assert rejected.value.retry_after_s is not None
            for stream in (*running, waiting):
                stream.cancel()
    finally:
        assert server.end() == 0


def test_ten_times_the_load_changes_no_text_and_takes_no_memory(server: Server, client: InferenceClient) -> None:
    expected = [text_of(client.generate("Once", seed=seed, max_tokens=200)) for seed in range(4)]
    before = server.metrics()["gptloop_inference_memory_bytes", "resident"]
    texts: list[tuple[int, str]] = []
    rejected = []

    def generate(worker: int) -> None:
        for number in range(8):
            seed = (worker + number) % 4
            try:
                texts.append((seed, text_of(client.generate("Once", seed=seed, max_tokens=200))))
            except errors.ResourceExhausted as error:
                rejected.append(error)

    threads = [threading.Thread(target=generate, args=(worker,)) for worker in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert len(texts) + len(rejected) == 320
    assert len(rejected) > 40 and len(texts) > 4
    assert all(error.retry_after_s is not None for error in rejected)
    assert all(text == expected[seed] for seed, text in texts)
    assert server.metrics()["gptloop_inference_memory_bytes", "resident"] - before < 16 << 20


def test_a_deadline_ends_a_waiting_call_and_a_running_one(server: Server, client: InferenceClient) -> None:
    running = [endless(client) for _ in range(2)]
    wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 2)
    with pytest.raises(errors.DeadlineExceeded):
        list(client.generate("x", max_tokens=5, timeout_s=0.3))
    until_waiting(server, 0)
    for stream in running:
        stream.cancel()
    with pytest.raises(errors.DeadlineExceeded):
        list(client.generate("x", max_tokens=16000, ignore_eos=True, timeout_s=0.3))
    wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 0)


def test_a_reader_that_is_too_slow_loses_its_stream_and_slows_no_other(server: Server, client: InferenceClient) -> None:
    with grpc.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        # More than fits between the two processes, and the client does not read it.
        call = stub.Generate(pb.GenerateRequest(prompt="x", max_tokens=16000, ignore_eos=True, logprobs=20))
        wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 1)
        tokens = sum(
            len(event.token_ids)
            for event in client.generate("Once", max_tokens=2000, ignore_eos=True)
            if isinstance(event, pb.Delta)
        )
        assert tokens == 2000
        wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 0)
        with pytest.raises(grpc.RpcError) as ended:
            for _ in call:
                pass
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "has not read a message for 1 s" in str(ended.value.details())


def test_a_slow_reader_gets_all_text_in_fewer_messages(tmp_path: Path) -> None:
    server = start(tmp_path / "var")
    request = pb.GenerateRequest(prompt="x", max_tokens=2000, ignore_eos=True, logprobs=20)
    request.sampling.seed = 5

    def written() -> float:
        return server.metrics()["gptloop_inference_generated_tokens_total",]

    try:
        with server.client() as client, grpc.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
            expected = text_of(client.generate("x", max_tokens=2000, ignore_eos=True, seed=5))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(request)
            wait_until(lambda: written() > 2010)
            # The slow reader does not read, and more is generated than fits between the two processes.
            list(client.generate("x", max_tokens=3000, ignore_eos=True))
            assert written() < 7000
            deltas = [answer.delta for answer in call if answer.HasField("delta")]
    finally:
        assert server.end() == 0
    assert sum(len(delta.token_ids) for delta in deltas) == 2000
    assert max(len(delta.token_ids) for delta in deltas) > 100
    assert "".join(delta.text for delta in deltas) == expected


def test_a_paused_process_ends_no_stream_and_stays_healthy(tmp_path: Path) -> None:
    server = start(tmp_path / "var", STUCK_AFTER_S=1, SLOW_READER_S=6)

    def is_blocked() -> bool:
        written = [server.metrics()["gptloop_inference_generated_tokens_total",] for _ in range(2)]
        return written[0] == written[1] > 0

    try:
        with server.client() as client, grpc.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            unread = stub.Generate(pb.GenerateRequest(prompt="x", max_tokens=3000, ignore_eos=True, logprobs=20))
            wait_until(is_blocked)
            stream = endless(client)
            server.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
            time.sleep(6.5)
            server.process.send_signal(signal.SIGCONT)
            wait_until(lambda: re.search(r"the process was paused for ([6-9]|\d\d)", "".join(server.lines)) is not None)
            assert sum(len(answer.delta.token_ids) for answer in unread) == 3000
            assert isinstance(next(stream), pb.Delta)
            assert server.serves()
    finally:
        assert server.end() == 0, server.lines


def test_sigterm_finishes_running_and_waiting_requests_and_rejects_new_ones(tmp_path: Path) -> None:
    server = start(tmp_path / "var", SLOTS=2, DRAIN_S=60)
    with InferenceClient(server.address, retries=0) as client:
        streams = [client.generate("Once", max_tokens=4000, ignore_eos=True) for _ in range(3)]
        until_waiting(server, 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping; send it again" in "".join(server.lines))

        def rejects() -> bool:
            with InferenceClient(server.address, retries=0) as other:
                try:
                    list(other.generate("x", max_tokens=1))
                except errors.Unavailable:
                    return True
                return False

        wait_until(rejects)
        for stream in streams:
            *_, last = stream
            assert isinstance(last, pb.Finished)
            assert last.reason == pb.FINISH_REASON_LENGTH
    # `end` would send a second signal, which ends the streams at once.
    server.process.wait(HANG_S)
    assert server.end() == 0


def test_a_second_signal_ends_all_requests_with_unavailable(tmp_path: Path) -> None:
    server = start(tmp_path / "var", SLOTS=2, DRAIN_S=60)
    with InferenceClient(server.address, retries=0) as client:
        running = [endless(client) for _ in range(2)]
        waiting = long(client)
        until_waiting(server, 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping; send it again" in "".join(server.lines))
        server.process.send_signal(signal.SIGTERM)
        for stream in (*running, waiting):
            with pytest.raises(errors.Unavailable, match="The server is shutting down; try again in a moment"):
                list(stream)
        # So the client can retry the waiting one on another server.
        assert waiting.started is None
    assert server.end() == 0


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Server]:
    server = start(tmp_path / "var", BREAKABLE, STUCK_AFTER_S=2)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)


def test_a_failed_step_ends_its_streams_and_the_server_continues(broken: Server) -> None:
    with InferenceClient(broken.address, retries=0) as client:
        expected = text_of(client.generate("Once", seed=1, max_tokens=20))
        streams = [endless(client) for _ in range(3)]
        wait_until(lambda: broken.metrics()["gptloop_inference_active_streams",] == 3)
        broken.order("fail once")
        for stream in streams:
            with pytest.raises(errors.GptloopError, match="INTERNAL: A step of this stream failed"):
                list(stream)
        assert text_of(client.generate("Once", seed=1, max_tokens=20)) == expected
        assert broken.serves()
        assert broken.process.poll() is None


def test_repeated_failures_end_the_process(broken: Server) -> None:
    with InferenceClient(broken.address, retries=0) as client:
        broken.order("fail")
        for _ in range(3):
            with pytest.raises(errors.GptloopError, match="INTERNAL"):
                list(client.generate("x"))
        with pytest.raises(errors.Unavailable, match="engine failed"):
            list(client.generate("x"))
    assert broken.process.wait(HANG_S) == 1


def test_a_dead_engine_ends_every_stream_and_the_health(tmp_path: Path) -> None:
    server = start(tmp_path / "var", BREAKABLE, SLOTS=2, DRAIN_S=1)
    try:
        with InferenceClient(server.address, retries=0) as client, grpc.insecure_channel(server.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=HANG_S)
            health = [next(watch).status]
            # Three failing steps end two streams each; the fourth one stops the engine.
            streams = [endless(client) for _ in range(2)]
            for waiting in range(1, 9):
                streams.append(long(client))
                until_waiting(server, waiting)
            server.order("fail")
            ends = []
            for stream in streams:
                with pytest.raises(errors.GptloopError) as ended:
                    list(stream)
                ends.append(str(ended.value))
            health += [answer.status for answer in watch]
        assert server.process.wait(HANG_S) == 1
    finally:
        server.end(signal.SIGKILL)
    assert [("A step of this stream failed" in end, "engine failed" in end) for end in ends] == [
        *[(True, False)] * 6,
        *[(False, True)] * 4,
    ]
    assert health[0] == health_pb2.HealthCheckResponse.SERVING
    assert health[-1] == health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_stuck_engine_ends_the_health_before_its_streams_and_the_process(broken: Server) -> None:
    publish_tiny_version(broken.registry, 2.0, config=LONG)
    with InferenceClient(broken.address, retries=0) as client:
        streams = [endless(client) for _ in range(4)]
        wait_until(lambda: broken.metrics()["gptloop_inference_active_streams",] == 4)
        broken.order("hang")
        wait_until(lambda: not broken.serves())
        assert broken.process.poll() is None
        newcomer = client.generate("x")
        for one in (*streams, newcomer):
            with pytest.raises(errors.Unavailable, match="engine is stuck"):
                list(one)
    assert broken.process.wait(HANG_S) == 1
    wait_until(lambda: re.search("a step has taken 2", "".join(broken.lines)) is not None)
    # No version is blamed for it.
    findings = broken.registry.decisions.findings()
    assert [finding.refusal for found in findings.values() for finding in found] == [None]


def test_a_stuck_engine_does_not_delay_the_end_of_the_server(broken: Server) -> None:
    with InferenceClient(broken.address, retries=0) as client:
        stream = endless(client)
        wait_until(lambda: broken.metrics()["gptloop_inference_active_streams",] == 1)
        begin = broken.order("hang")
        broken.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.Unavailable, match="engine is stuck"):
            list(stream)
    assert broken.process.wait(HANG_S) == 1
    # It waits neither for the drain of 30 s nor for a client's timeout.
    assert time.monotonic() - begin < 20.0
