"""Odd content of Redis, and odd files of its password, under a live trainer and worker."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc

from shared.errors import GptloopError
from shared.pb.training.v1 import training_pb2
from tests.certificates import replace
from tests.fuzzers.area import BAD_CODES, CALL_S, PROJECT, Area
from tests.mutations import json_bytes, odd_bytes, odd_file
from tests.redis_process import PASSWORD, RedisServer
from tests.registries import disk_registry, registry_id
from tests.waiting import HANG_S, wait_until
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import PrepareRequest

# The kinds of keys: a part of the name, and the type that it must have.
KINDS = {
    "records of jobs": (b":job:", b"hash"),
    "events of jobs": (b":events:", b"stream"),
    "leases of attempts": (b":lease:", b"string"),
    "list of jobs": (b":jobs", b"zset"),
    "list of open jobs": (b":open", b"zset"),
    "list of workers": (b":workers", b"set"),
    "leases of workers": (b":worker:", b"string"),
    "counters": (b":tokens", b"string"),
    "RQ's queue": (b"rq:queue:", b"list"),
    "RQ's jobs": (b"rq:job:", b"hash"),
    "RQ's workers": (b"rq:worker:", b"hash"),
    "RQ's registries": (b"rq:wip:", b"zset"),
    "RQ's other keys": (b"rq:", b""),
}
_ANOTHER_TYPE = "another type of key"


class Trainer:
    """A trainer's API and a worker on a Redis of their own, which holds some jobs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.redis = RedisServer(folder)
        self.admin = self.redis.admin()
        self.var = folder / "var"
        self.queue = JobQueue(self.admin, registry_id(self.var / "registry"))
        self.password = replace(folder / "password", PASSWORD.encode())
        self._environment = os.environ | {
            "GPTLOOP_VAR": str(self.var),
            "REDIS_URL": f"unix://gptloop@{self.redis.socket}",
            "GPTLOOP_REDIS_PASSWORD_FILE": str(self.password),
            "GPTLOOP_TRAINER_PORT": "0",
            "GPTLOOP_TRAINER_METRICS_PORT": "0",
        }
        self.lines: list[str] = []
        self.processes = {command: self._start(command) for command in ("serve", "work")}
        wait_until(lambda: "gRPC on" in "".join(self.lines.copy()))
        wait_until(lambda: bool(self.admin.keys("rq:worker:*")))
        (line,) = [line for line in self.lines.copy() if "gRPC on" in line]
        self.channel: Any = grpc.insecure_channel(line.partition("gRPC on ")[2].partition(",")[0])

    def _start(self, command: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer_service", command],
            cwd=PROJECT,
            env=self._environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=lambda: self.lines.extend(process.stderr or ()), daemon=True).start()
        return process

    def check(self, area: Area) -> None:
        """Keeps which process has ended, and starts a worker again."""
        for command, process in self.processes.items():
            if process.poll() is not None:
                said = [line for line in self.lines.copy() if "access_log" not in line]
                area.fell(f"`trainer_service {command}` ended: {''.join(said[-1:]).strip()[-150:]}", said[-30:])
                if command == "work":
                    self.processes[command] = self._start(command)

    def submit(self, is_good: bool = False) -> str:
        """Queues a job, which fails at once unless it is good, because its text does not exist."""
        text = self.var / "text.txt"
        text.write_text("<|endoftext|>".join(f"Tale {number} of a fox." for number in range(400)))
        overrides = {"tokenizer": "bpe", "vocabulary_size": "300", "context_length": "16", "evaluation_windows": "2"}
        spec = PrepareRequest(dataset=(str(text),), overrides=overrides).resolve(disk_registry(self.var / "registry"))
        if not is_good:
            text.unlink()
        return self.queue.enqueue(spec).id

    def call(self, method: str, message: Any, limit_s: float = CALL_S) -> grpc.StatusCode:
        """Returns the status of a call."""
        try:
            list(
                self.channel.unary_stream(f"/training.v1.TrainingService/{method}")(
                    message.SerializeToString(), timeout=limit_s
                )
            )
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def finishes(self) -> str:
        """Has a good job done; returns what is wrong, or nothing."""
        try:
            job = self.submit(is_good=True)
            wait_until(lambda: self.queue.store.get(job).state.is_final, hang_s=120)
            found = self.queue.store.get(job)
        except (AssertionError, GptloopError) as error:
            return repr(error)
        return "" if found.state is JobState.FINISHED else found.reason

    def mend(self) -> None:
        """Removes the keys that have another type than theirs, as whoever wrote them would have to."""
        redis: Any = self.admin
        for key in redis.keys("*"):
            expected = KINDS.get(kind_of(key), (b"", b""))[1]
            # None of RQ's other keys is a string.
            if redis.type(key) not in ((expected,) if expected else (b"hash", b"zset", b"set", b"list")):
                redis.delete(key)

    def end(self) -> None:
        """Ends everything."""
        self.channel.close()
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(HANG_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.redis.end()


def kind_of(key: bytes) -> str:
    """Returns the kind of a key, or nothing."""
    ours = key.startswith(b"gptloop:")
    if key.endswith(b":executions"):
        return "RQ's other keys"
    for kind, (part, _) in KINDS.items():
        if part in key and ours != part.startswith(b"rq:"):
            return kind
    return ""


def _change(rng: random.Random, redis: Any, key: bytes) -> object:
    """Changes a value; returns what was written."""
    given: Any = None
    match redis.type(key):
        case b"hash":
            name = rng.choice(redis.hkeys(key) or [b"state"])
            given = odd_file(rng, redis.hget(key, name) or b"")
            redis.hset(key, name, given) if rng.random() < 0.9 else redis.hdel(key, name)
        case b"string":
            given = odd_bytes(rng, redis.get(key) or b"")
            redis.set(key, given, ex=60)
        case b"zset":
            members = (b"", b"x" * 300, b"\xff", *redis.zrange(key, 0, 3))
            given = {rng.choice(members): rng.choice((0, -1, 1e300, 0.5, float("inf")))}
            redis.zadd(key, given)
        case b"list":
            given = odd_bytes(rng, rng.choice(redis.lrange(key, 0, -1) or [b""]))
            redis.lpush(key, given)
        case b"set":
            given = odd_bytes(rng, rng.choice(list(redis.smembers(key)) or [b""]))
            redis.sadd(key, given)
        case b"stream":
            given = odd_file(rng, json_bytes({"step": 1, "kind": "progress", "time": 1.0}))
            redis.xadd(key, {rng.choice((b"event", b"kind", b"")): given})
    return given


def try_redis(rng: random.Random, area: Area, trainer: Trainer) -> None:
    """Changes a key in Redis, of each kind as often as of the others, and asks the trainer about jobs."""
    redis: Any = trainer.admin
    if redis.dbsize() < 14 or rng.random() < 0.005:
        try:
            trainer.submit()
            redis.set(trainer.queue.store.keys.tokens, 5)
            redis.set(trainer.queue.store.keys.lease(trainer.submit()), "1 8 a-1", ex=60)
        except GptloopError:
            redis.flushall()
    kinds: dict[str, list[bytes]] = {}
    for key in redis.keys("*"):
        kinds.setdefault(kind_of(key), []).append(key)
    kinds.pop("", None)
    if not kinds:
        return
    kind = rng.choice(sorted(kinds))
    key = rng.choice(sorted(kinds[kind]))
    if rng.random() < 0.04:
        area.tried(_ANOTHER_TYPE)
        redis.delete(key)
        given: object = (redis.set if redis.type(key) != b"string" else redis.lpush)(key, "x")
    else:
        area.tried(kind)
        given = _change(rng, redis, key)
    jobs = [key.rpartition(b":")[2].decode(errors="replace") for key in kinds.get("records of jobs", [])] or [""]
    job = rng.choice(sorted(jobs))
    calls: list[tuple[str, Any, float]] = [
        ("ListJobs", training_pb2.ListJobsRequest(), 1.0),
        ("GetJob", training_pb2.GetJobRequest(job_id=job), 1.0),
        ("WatchJob", training_pb2.WatchJobRequest(job_id=job), 0.1),
        ("CancelJob", training_pb2.CancelJobRequest(job_id=job), 0.05),
    ]
    for method, message, share in calls:
        if rng.random() < share:
            # Watching a job that waits ends with the deadline.
            code = trainer.call(method, message, 0.1 if method == "WatchJob" else CALL_S)
            if code in BAD_CODES and not (method == "WatchJob" and code is grpc.StatusCode.DEADLINE_EXCEEDED):
                area.fell(f"{method} {code.name}: {given!r:.60}", (key, given))
    trainer.check(area)
    if rng.random() < 0.01:
        trainer.mend()
    if rng.random() < 0.003:
        redis.flushall()


def check_redis(area: Area, trainer: Trainer) -> None:
    """A good job must finish beside what is left, and beside nothing."""
    trainer.mend()
    if failed := trainer.finishes():
        area.fell(f"a good job does not finish beside odd ones: {failed}"[:300], trainer.lines[-40:])
    trainer.check(area)
    trainer.admin.flushall()
    if failed := trainer.finishes():
        area.fell(f"a good job does not finish: {failed}"[:300], trainer.lines[-40:])


def try_password(rng: random.Random, area: Area, trainer: Trainer) -> None:
    """Changes the file of Redis's password, and breaks the connections, so that it is read again."""
    area.tried()
    after = odd_bytes(rng, PASSWORD.encode())
    replace(trainer.password, after)
    # Redis refuses a wrong one; white space around it is no part of it.
    lines = after.splitlines()
    is_right = len(lines) == 1 and after.decode(errors="replace").strip() == PASSWORD
    trainer.admin.client_kill_filter(_type="normal", skipme=True)
    code = trainer.call("ListJobs", training_pb2.ListJobsRequest())
    if code is not grpc.StatusCode.UNAVAILABLE and not is_right:
        area.fell(f"with another password, a call ends with {code.name}", after)
    trainer.check(area)
    replace(trainer.password, PASSWORD.encode())
    if (code := trainer.call("ListJobs", training_pb2.ListJobsRequest())) is not grpc.StatusCode.OK:
        area.fell(f"with the password back, a call ends with {code.name}", after)
