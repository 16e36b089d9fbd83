import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from redis.exceptions import ConnectionError as RedisConnectionError

from trainer_service.queue import JobQueue
from trainer_service.redis_server import check_server, connect, find_redis_server
from trainer_service.rq_jobs import AttemptJob
from trainer_service.worker import TrainingWorker


def test_a_worker_takes_jobs_from_a_socket_with_any_name(tmp_path: Path) -> None:
    socket = tmp_path / """sp ace = %d 'two' ü.sock"""
    program, _ = find_redis_server()
    server = subprocess.Popen([program, "--port", "0", "--unixsocket", socket, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        with connect(f"unix://{quote(str(socket))}") as connection:
            deadline_s = time.monotonic() + 30
            while True:
                try:
                    connection.ping()
                    break
                except RedisConnectionError:
                    assert server.poll() is None
                    assert time.monotonic() < deadline_s
            check_server(connection)
            worker = TrainingWorker([JobQueue(connection, "none").line.rq], connection=connection, job_class=AttemptJob)
            assert worker.work(burst=True) is False
    finally:
        server.kill()
        server.wait()
