"""Odd content of Redis under a live trainer and worker."""

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
from shared.registry.identity import registry_id
from shared.registry.store import Registry
from tests.fuzzers.area import BAD_CODES, CALL_S, PROJECT, Area
from tests.mutations import json_bytes, odd_bytes, odd_file
from tests.redis_process import RedisServer
from tests.waiting import HANG_S, wait_until
from trainer_service.jobs.queue import JobQueue


class Trainer:
    """A trainer's API and a worker on a Redis of their own, which holds some jobs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.redis = RedisServer(folder)
        self.admin = self.redis.admin()
        self.var = folder / "var"
        self.queue = JobQueue(self.admin, registry_id(self.var / "registry"))
        own = {"GPTLOOP_VAR": str(self.var), "REDIS_URL": self.redis.url}
        ports = {"GPTLOOP_TRAINER_PORT": "0", "GPTLOOP_TRAINER_METRICS_PORT": "0"}
        self.lines: list[str] = []
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "trainer_service", command],
                cwd=PROJECT,
                env=os.environ | own | ports,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in ("serve", "work")
        ]
        for process in self.processes:
            threading.Thread(target=lambda one=process: self.lines.extend(one.stderr), daemon=True).start()
        wait_until(lambda: "gRPC on" in "".join(self.lines.copy()))
        (line,) = [line for line in self.lines.copy() if "gRPC on" in line]
        self.channel: Any = grpc.insecure_channel(line.partition("gRPC on ")[2].partition(",")[0])

    def submit(self) -> str:
        """Queues a job that fails at once, because its text does not exist."""
        from trainer_service.jobs.requests import PrepareRequest

        text = self.var / "text.txt"
        text.write_text("<|endoftext|>".join(f"Tale {number} of a fox." for number in range(400)))
        spec = PrepareRequest(dataset=(str(text),)).resolve(Registry(self.var / "registry"))
        text.unlink()
        return self.queue.enqueue(spec).id

    def works(self) -> bool:
        """Whether a new job is taken and ends, once Redis holds nothing else."""
        self.admin.flushall()
        job = self.submit()
        try:
            wait_until(lambda: self.queue.store.get(job).state.is_final)
        except AssertionError:
            return False
        return all(process.poll() is None for process in self.processes)

    def end(self) -> None:
        """Ends everything."""
        self.channel.close()
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(HANG_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.redis.end()


def try_redis(rng: random.Random, area: Area, trainer: Trainer) -> None:
    """Changes something in Redis, and asks the trainer about all jobs."""
    redis: Any = trainer.admin
    if redis.dbsize() < 12 or rng.random() < 0.01:
        try:
            trainer.submit()
        except GptloopError:
            redis.flushall()
    if not (keys := redis.keys("*")):
        return
    key = rng.choice(keys)
    area.inputs += 1
    given: object = None
    match redis.type(key):
        case b"hash":
            name = rng.choice(redis.hkeys(key))
            given = odd_file(rng, redis.hget(key, name) or b"")
            redis.hset(key, name, given) if rng.random() < 0.9 else redis.hdel(key, name)
        case b"string":
            given = odd_bytes(rng, redis.get(key) or b"")
            redis.set(key, given, ex=60)
        case b"zset":
            given = (rng.choice((b"", b"x" * 300, b"\xff", *redis.zrange(key, 0, 3))), rng.choice((0, -1, 1e300, 0.5)))
            redis.zadd(key, {given[0]: given[1]})
        case b"list":
            given = odd_bytes(rng, rng.choice(redis.lrange(key, 0, -1) or [b""]))
            redis.lpush(key, given)
        case b"set":
            given = odd_bytes(rng, rng.choice(list(redis.smembers(key)) or [b""]))
            redis.sadd(key, given)
        case b"stream":
            given = odd_file(rng, json_bytes({"step": 1, "kind": "progress", "time": 1.0}))
            redis.xadd(key, {rng.choice((b"event", b"kind", b"")): given})
    if rng.random() < 0.02:
        # Another type under the same name.
        redis.delete(key)
        redis.set(key, "x")
    if rng.random() < 0.02:
        redis.flushall()
    jobs = [key.rpartition(b":")[2] for key in redis.keys("gptloop:*:job:*")] or [b""]
    for path, message in (
        ("ListJobs", training_pb2.ListJobsRequest()),
        ("GetJob", training_pb2.GetJobRequest(job_id=rng.choice(jobs).decode(errors="replace"))),
        ("WatchJob", training_pb2.WatchJobRequest(job_id=rng.choice(jobs).decode(errors="replace"))),
        ("CancelJob", training_pb2.CancelJobRequest(job_id=rng.choice(jobs).decode(errors="replace"))),
    ):
        if path == "CancelJob" and rng.random() < 0.9:
            continue
        limit_s = 0.1 if path == "WatchJob" else CALL_S
        try:
            list(
                trainer.channel.unary_stream(f"/training.v1.TrainingService/{path}")(
                    message.SerializeToString(), timeout=limit_s
                )
            )
        except grpc.RpcError as error:
            late = path == "WatchJob" and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if error.code() in BAD_CODES and not late:
                area.fell(f"{path} {error.code().name}: {given!r:.60}", (key, given))
