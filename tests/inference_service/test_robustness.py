"""What a client meets when a server is full, slow, broken or told to end: real processes, real calls."""

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

from inference_service.client.client import InferenceClient
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.fakes import TINY, publish_tiny_version
from tests.inference_service.process import BREAKABLE, SERVE, SMALL_WINDOW, Server, text_of
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

# So much context that a stream lasts for seconds.
LONG = replace(TINY, context_length=16384)


def start(var: Path, command: Sequence[str] = SERVE, **settings: Any) -> Server:
    server = Server(var, command, **{f"GPTLOOP_INFERENCE_{name}": str(value) for name, value in settings.items()})
    publish_tiny_version(server.registry, 1.0, config=LONG)
    wait_until(server.serves)
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two slots, in which two more may wait, and which has no patience with slow readers."""
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


def long(client: InferenceClient) -> Any:
    """A stream that lasts for seconds; nothing of it comes as long as it waits."""
    return client.generate("Once", max_tokens=16000, ignore_eos=True)


def until_waiting(server: Server, requests: int) -> None:
    wait_until(lambda: server.metrics()["gptloop_inference_waiting_requests",] == requests)


def endless(client: InferenceClient) -> Any:
    """One that has begun to come."""
    stream = long(client)
    assert isinstance(next(iter(stream)), pb.Started)
    return stream


def test_samples_of_one_prompt_are_those_of_their_seeds(client: InferenceClient) -> None:
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


def test_a_full_queue_is_refused_with_the_time_to_come_back(server: Server, client: InferenceClient) -> None:
    running = [endless(client) for _ in range(2)]
    wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 2)
    waiting = [long(client) for _ in range(2)]
    until_waiting(server, 2)
    with pytest.raises(errors.ResourceExhausted, match="2 requests wait already") as refused:
        list(client.generate("x"))
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s > 0
    assert server.metrics()["gptloop_inference_requests_total", "resource_exhausted"] >= 1
    for stream in (*running, *waiting):
        stream.cancel()


def test_prompt_tokens_that_wait_are_bounded_too(tmp_path: Path) -> None:
    server = start(tmp_path / "var", SLOTS=2, MAX_WAITING_PROMPT_TOKENS=50)
    try:
        with InferenceClient(server.address, retries=0) as client:
            # What is longer than the limit has its turn alone.
            list(client.generate("x" * 60, max_tokens=1))
            running = [endless(client) for _ in range(2)]
            wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 2)
            waiting = long(client)
            until_waiting(server, 1)
            with pytest.raises(errors.ResourceExhausted, match="4 prompt tokens wait already, and 60 more") as refused:
                list(client.generate("x" * 60))
            assert refused.value.retry_after_s is not None
            for stream in (*running, waiting):
                stream.cancel()
    finally:
        assert server.end() == 0


def test_ten_times_the_load_harms_no_stream_and_takes_no_memory(server: Server, client: InferenceClient) -> None:
    expected = [text_of(client.generate("Once", seed=seed, max_tokens=200)) for seed in range(4)]
    before = server.metrics()["gptloop_inference_memory_bytes", "resident"]
    texts: list[tuple[int, str]] = []
    refused = []

    def ask(worker: int) -> None:
        for number in range(8):
            seed = (worker + number) % 4
            try:
                texts.append((seed, text_of(client.generate("Once", seed=seed, max_tokens=200))))
            except errors.ResourceExhausted as error:
                refused.append(error)

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert len(texts) + len(refused) == 320
    assert len(refused) > 40 and len(texts) > 4
    assert all(error.retry_after_s is not None for error in refused)
    assert all(text == expected[seed] for seed, text in texts)
    assert server.metrics()["gptloop_inference_memory_bytes", "resident"] - before < 16 << 20


def test_a_deadline_ends_a_call_that_waits_and_one_that_runs(server: Server, client: InferenceClient) -> None:
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


def test_a_reader_that_is_too_slow_is_ended_and_slows_nobody(server: Server, client: InferenceClient) -> None:
    with grpc.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        # So much that it does not fit between the two processes, and nobody reads it.
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


def test_a_slow_reader_gets_everything_in_fewer_messages(tmp_path: Path) -> None:
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
            # Nobody reads; as long as another stream of several thousand steps takes, more is generated than fits.
            list(client.generate("x", max_tokens=3000, ignore_eos=True))
            assert written() < 7000
            deltas = [answer.delta for answer in call if answer.HasField("delta")]
    finally:
        assert server.end() == 0
    assert sum(len(delta.token_ids) for delta in deltas) == 2000
    assert max(len(delta.token_ids) for delta in deltas) > 100
    assert "".join(delta.text for delta in deltas) == expected


def test_a_process_that_was_paused_blames_neither_its_engine_nor_a_client(tmp_path: Path) -> None:
    server = start(tmp_path / "var", STUCK_AFTER_S=1, SLOW_READER_S=2.4)

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
            time.sleep(2.5)
            server.process.send_signal(signal.SIGCONT)
            wait_until(lambda: "the process was paused for 2." in "".join(server.lines))
            assert sum(len(answer.delta.token_ids) for answer in unread) == 3000
            assert isinstance(next(stream), pb.Delta)
            assert server.serves()
    finally:
        assert server.end() == 0, server.lines


def test_sigterm_lets_running_and_waiting_requests_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    server = start(tmp_path / "var", SLOTS=2, DRAIN_S=60)
    with InferenceClient(server.address, retries=0) as client:
        streams = [client.generate("Once", max_tokens=4000, ignore_eos=True) for _ in range(3)]
        until_waiting(server, 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "ending" in "".join(server.lines))

        def refuses() -> bool:
            with InferenceClient(server.address, retries=0) as other:
                try:
                    list(other.generate("x", max_tokens=1))
                except errors.Unavailable:
                    return True
                return False

        wait_until(refuses)
        for stream in streams:
            *_, last = stream
            assert isinstance(last, pb.Finished)
            assert last.reason == pb.FINISH_REASON_LENGTH
    # A second signal would force it.
    server.process.wait(HANG_S)
    assert server.end() == 0


def test_a_second_signal_ends_running_and_waiting_requests_as_unavailable(tmp_path: Path) -> None:
    server = start(tmp_path / "var", SLOTS=2, DRAIN_S=60)
    with InferenceClient(server.address, retries=0) as client:
        running = [endless(client) for _ in range(2)]
        waiting = long(client)
        until_waiting(server, 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "ending" in "".join(server.lines))
        server.process.send_signal(signal.SIGTERM)
        for stream in (*running, waiting):
            with pytest.raises(errors.Unavailable, match="The server is shutting down; try again in a moment"):
                list(stream)
        # So another server may be asked the same.
        assert waiting.started is None
    assert server.end() == 0


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Server]:
    server = start(tmp_path / "var", BREAKABLE, STUCK_AFTER_S=2)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)


def test_a_failed_step_ends_its_streams_and_the_server_goes_on(broken: Server) -> None:
    with InferenceClient(broken.address, retries=0) as client:
        expected = text_of(client.generate("Once", seed=1, max_tokens=20))
        streams = [endless(client) for _ in range(3)]
        wait_until(lambda: broken.metrics()["gptloop_inference_active_streams",] == 3)
        broken.order("fail once")
        for stream in streams:
            with pytest.raises(errors.GptloopError, match="INTERNAL: The step that this stream was in failed"):
                list(stream)
        assert text_of(client.generate("Once", seed=1, max_tokens=20)) == expected
        assert broken.serves()
        assert broken.process.poll() is None


def test_steps_that_keep_failing_end_the_process(broken: Server) -> None:
    with InferenceClient(broken.address, retries=0) as client:
        broken.order("fail")
        for _ in range(3):
            with pytest.raises(errors.GptloopError, match="INTERNAL"):
                list(client.generate("x"))
        with pytest.raises(errors.Unavailable, match="engine failed"):
            list(client.generate("x"))
    assert broken.process.wait(HANG_S) == 1


def test_a_dead_engine_ends_every_stream_and_is_not_left_serving(tmp_path: Path) -> None:
    server = start(tmp_path / "var", BREAKABLE, SLOTS=2, DRAIN_S=1)
    try:
        with InferenceClient(server.address, retries=0) as client, grpc.insecure_channel(server.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=HANG_S)
            health = [next(watch).status]
            # Two at a time, three steps end six of them; with the fourth the engine dies.
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
    assert [("step that this stream was in failed" in end, "engine failed" in end) for end in ends] == [
        *[(True, False)] * 6,
        *[(False, True)] * 4,
    ]
    assert health[0] == health_pb2.HealthCheckResponse.SERVING
    assert health[-1] == health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_stuck_engine_stops_serving_before_its_streams_and_the_process_end(broken: Server) -> None:
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
    # It is the engine's fault, not the version's.
    findings = broken.registry.decisions.findings()
    assert [finding.refusal for found in findings.values() for finding in found] == [None]


def test_an_engine_that_is_stuck_while_the_server_ends_does_not_hold_it(broken: Server) -> None:
    with InferenceClient(broken.address, retries=0) as client:
        stream = endless(client)
        wait_until(lambda: broken.metrics()["gptloop_inference_active_streams",] == 1)
        begin = broken.order("hang")
        broken.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.Unavailable, match="engine is stuck"):
            list(stream)
    assert broken.process.wait(HANG_S) == 1
    # Neither the drain of 30 s nor the clients' patience has to end.
    assert time.monotonic() - begin < 20.0
