"""The server as a process, over real gRPC."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from inference_service.client import AdminClient, InferenceClient
from shared import errors
from shared.device.native import PREBUILT
from shared.gpt.operations import on_cpu
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.decoders import default_weights
from tests.fakes import publish_tiny_version
from tests.inference_service.process import ROOT, Server, text_of
from tests.records import write_record
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that serves version 2 of two."""
    server = Server(tmp_path_factory.mktemp("server") / "var")
    try:
        # In this order: everything that an empty registry answers, then the first version.
        assert not server.serves()
        with server.client() as client:
            for call in (lambda: list(client.generate("x")), lambda: client.tokenize("x"), client.model):
                with pytest.raises(errors.Unavailable, match="No version serves yet"):
                    call()
            with pytest.raises(errors.Unavailable, match="registry is empty"):
                client.model(label="best")
        publish_tiny_version(server.registry, 2.0, seed=1)
        wait_until(server.serves)
        publish_tiny_version(server.registry, 1.0, seed=2)
        with server.client() as client:
            wait_until(lambda: client.model().version == 2)
        yield server
    finally:
        assert server.end() == 0, server.lines
        log = "".join(server.lines)
        assert "Traceback" not in log, log


def test_health_is_serving_for_the_service_too(server: Server) -> None:
    assert server.health("inference.v1.InferenceService") == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {one.name for answer in answers for one in answer.list_services_response.service}
    assert "inference.v1.InferenceService" in names


def test_a_stream_is_a_start_then_tokens_then_an_end(server: Server) -> None:
    with server.client() as client:
        first, *deltas, last = client.generate("Once", seed=2**64 - 1, max_tokens=12, ignore_eos=True, logprobs=2)
        model = client.model()
    assert isinstance(first, pb.Started)
    assert (first.model_version, first.seed, first.prompt_tokens) == (2, 2**64 - 1, 4)
    assert first.model_digest == server.registry.version(2).digest
    assert first.weight_format == default_weights()
    counts = [(len(delta.token_ids), len(delta.logprobs)) for delta in deltas if isinstance(delta, pb.Delta)]
    # What is drawn while a message is on its way comes with the next one.
    assert [sum(column) for column in zip(*counts, strict=True)] == [12, 12]
    assert all(tokens == logprobs > 0 for tokens, logprobs in counts)
    assert isinstance(last, pb.Finished)
    assert (last.reason, last.generated_tokens) == (pb.FINISH_REASON_LENGTH, 12)
    assert 0 <= last.queue_seconds <= last.time_to_first_token_seconds <= last.total_seconds
    assert (model.version, list(model.labels), model.config.context_length) == (2, ["best", "latest"], 96)


def test_version_and_seed_give_the_same_text_again(server: Server) -> None:
    with server.client() as client:
        events = list(client.generate("Once", max_tokens=30, version=1))
        assert isinstance(events[0], pb.Started)
        again = client.generate("Once", max_tokens=30, version=1, seed=events[0].seed)
        other = client.generate("Once", max_tokens=30, version=2, seed=events[0].seed)
        text = text_of(iter(events))
        assert text == text_of(again) != text_of(other)


def test_tokens_are_those_of_the_tokenizer(server: Server) -> None:
    with server.client() as client:
        assert client.tokenize("hé") == client.tokenize("hé", version=1) == list("hé".encode())
        assert client.detokenize(list("hé".encode())) == client.detokenize(list("hé".encode()), label="best") == "hé"
        assert text_of(client.generate(list(b"Once"), seed=1)) == text_of(client.generate("Once", seed=1))


@pytest.mark.parametrize(
    ("parameters", "kind", "sentence"),
    [
        ({"version": 99}, errors.NotFound, "no version 99"),
        (
            {"label": "worst"},
            errors.InvalidArgument,
            "'worst' is not a label.*best, latest, stable, run:<name> and pinned:",
        ),
        ({"label": "stable"}, errors.NotFound, "No version has the label 'stable' now"),
        ({"label": "pinned:9"}, errors.NotFound, "no version 9"),
        ({"max_tokens": 0}, errors.InvalidArgument, "max_tokens is 0"),
        ({"top_p": 1.5}, errors.InvalidArgument, "top_p is 1.5"),
        ({"prompt": "x" * 96}, errors.InvalidArgument, "96 .*fewer than 96, the context length"),
        ({"prompt": "x" * 1_000_000}, errors.InvalidArgument, "context"),
        ({"prompt": [300]}, errors.InvalidArgument, "prompt_tokens contains 300"),
        ({"version": 0}, errors.InvalidArgument, "model.version is 0"),
    ],
)
def test_wrong_input_has_its_code_and_sentence(
    server: Server, parameters: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with server.client() as client, pytest.raises(kind, match=sentence):
        list(client.generate(**{"prompt": "x", **parameters}))


def test_a_client_that_leaves_frees_its_slot(server: Server) -> None:
    with server.client() as client:
        for _ in range(20):
            # Version 1 does not serve, so each time it is loaded and, its last stream being gone, freed.
            stream = client.generate("Once", version=1, max_tokens=90, ignore_eos=True)
            assert isinstance(next(stream), pb.Started)
            stream.cancel()
        wait_until(lambda: server.metrics()["gptloop_inference_active_streams",] == 0)
        assert server.metrics()["gptloop_inference_waiting_requests",] == 0
        assert server.metrics()["gptloop_inference_requests_total", "cancelled"] >= 1


def test_the_metrics_page_has_every_name(server: Server) -> None:
    with server.client() as client:
        list(client.generate("x", max_tokens=3))
    values = server.metrics()
    names = {name for name, *_ in values}
    for name in (
        "generated_tokens_total",
        "prompt_tokens_total",
        "tokens_per_second",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "requests_total",
        "active_streams",
        "waiting_requests",
        "memory_bytes",
        "model_info",
        "swaps_total",
    ):
        assert f"gptloop_inference_{name}" in names
    assert "process_resident_memory_bytes" in names
    assert values["gptloop_inference_swaps_total",] == 1
    assert values["gptloop_inference_memory_bytes", "active"] > 0
    assert values["gptloop_inference_memory_bytes", "resident"] > 50e6


def test_a_port_in_use_is_one_sentence_and_exit_1(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for variable in ("GPTLOOP_INFERENCE_PORT", "GPTLOOP_INFERENCE_METRICS_PORT"):
            ports = {"GPTLOOP_INFERENCE_PORT": "0", "GPTLOOP_INFERENCE_METRICS_PORT": "0", variable: port}
            done = subprocess.run(
                [sys.executable, "-m", "inference_service", "serve"],
                cwd=ROOT,
                env={**os.environ, "GPTLOOP_VAR": str(tmp_path / "var"), **ports},
                capture_output=True,
                text=True,
                timeout=HANG_S,
            )
            assert done.returncode == 1
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith(f"error: Port {port} of 127.0.0.1 is in use; ")
            assert f"set {variable} to another port" in last
            assert "Traceback" not in done.stderr


def test_no_server_is_one_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with InferenceClient(address) as client, AdminClient(address) as admin:
            for call in (lambda: list(client.generate("x")), admin.roll_back):
                with pytest.raises(errors.Unavailable, match=f"No server answers at {address}"):
                    call()


def command(*arguments: str, address: str, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inference_service", *arguments, "--address", address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        input=typed,
        timeout=HANG_S,
    )


def test_generate_prints_the_text_alone_and_says_how_to_have_it_again(server: Server) -> None:
    once = ("generate", "--prompt", "Once", "--max-tokens", "20")
    first = command(*once, address=server.address)
    assert first.returncode == 0, first.stderr
    summary, again = first.stderr.strip().splitlines()
    assert re.fullmatch(
        r"version 2 · seed \d+ · \d+ tokens · \d+ tokens/s · first token \d+ ms · (LENGTH|EOS)", summary
    )
    gptloop, *words = shlex.split(again.removeprefix("The same text again: "))
    assert gptloop == "gptloop"
    second = command(*words, address=server.address)
    assert second.stdout == first.stdout
    assert first.stdout.startswith("Once")


def test_prompts_of_a_file_run_together_and_print_in_order(server: Server, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("One\n\nTwo\nThree\n")
    done = command(
        "generate",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--max-tokens",
        "3",
        "--seed",
        "1",
        address=server.address,
    )
    assert done.returncode == 0, done.stderr
    assert re.search("One.*Two.*Three", done.stdout, re.DOTALL)
    assert re.search("--- 1: version 2.*--- 2: version 2.*--- 3: version 2.*3 prompts · ", done.stderr, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("generate", "--prompt", "x", "--version", "99"), 1, "There is no version 99"),
        (("generate", "--prompt", "x", "--top-p", "1.5"), 2, "top_p is 1.5"),
        (("generate",), 2, "PROMPT=… or PROMPTS=<file>"),
        (("generate", "--prompts", "/nowhere/prompts.txt"), 2, "'/nowhere/prompts.txt' cannot be read"),
    ],
)
def test_a_wrong_command_is_one_sentence(server: Server, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    done = command(*arguments, address=server.address)
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_chat_continues_each_line_and_takes_commands(server: Server) -> None:
    lines = "/seed 5\nOnce\nOnce\n/temperature hot\n/nonsense\n\n/quit\n"
    done = command("chat", "--max-tokens", "8", address=server.address, typed=lines)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("seed 5 ", done.stderr)) == 2
    assert "not 'hot'" in done.stderr
    assert "Unknown command '/nonsense'" in done.stderr


def test_clients_load_no_model_framework() -> None:
    check = "import sys, inference_service.__main__, inference_service.chat; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=HANG_S).returncode == 0


def test_the_environment_lets_best_follow_evaluations(tmp_path: Path) -> None:
    server = Server(tmp_path / "var", GPTLOOP_BEST_BY="evaluation")
    try:
        worse, best = (publish_tiny_version(server.registry, bits_per_byte) for bits_per_byte in (2.0, 1.0))
        with server.client() as client, AdminClient(server.address) as admin:
            wait_until(lambda: server.serves() and client.model().version == best.version)
            write_record(server.registry, worse, 1.5)
            wait_until(lambda: client.model().version == worse.version)
            assert client.model(label="best").evaluation.bits_per_byte == 1.5
            assert admin.versions().best_by == pb.BEST_BY_EVALUATION
        assert server.metrics()["gptloop_inference_evaluated_bits_per_byte", "aa", str(worse.version)] == 1.5
    finally:
        assert server.end() == 0, server.lines


@pytest.mark.skipif(not on_cpu() or PREBUILT.is_dir(), reason="Nothing is compiled.")
def test_the_decoder_is_compiled_before_there_is_a_version(tmp_path: Path) -> None:
    cache = tmp_path / "var" / "cache"
    cache.mkdir(parents=True)
    server = Server(tmp_path / "var")
    try:
        wait_until(lambda: any(b"pack_weights" in file.read_bytes() for file in cache.glob("inference/native-*.so")))
        assert not server.serves()
    finally:
        assert server.end() == 0, server.lines
