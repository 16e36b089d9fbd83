"""Processes that train together over a ring on the loopback interface, each of which calls a function of a test."""

import importlib
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shared.device.accelerator import prepare
from tests.mlx_on_cpu import speed_up_mlx
from tests.waiting import HANG_S, wait_until

ROOT = Path(__file__).parent.parent


@contextmanager
def ring(count: int, folder: Path) -> Iterator[list[dict[str, str]]]:
    """Yields the environments of the ranks of a ring. Its ports stay bound, and MLX shares them, so nobody else gets
    one of them meanwhile."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(("127.0.0.1", 0))
        hostfile = folder / "hosts.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]))
        yield [os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)} for rank in range(count)]


def start(
    function: Callable[..., Any], arguments: Sequence[Any], result: Path, environment: dict[str, str], among: int = 1
) -> Any:
    """Starts a process that calls a function of a module and writes what it returns, once all of them are ready."""
    called = pickle.dumps((function.__module__, function.__name__, arguments, result, among))
    command = [sys.executable, "-m", "tests.ring_processes", called.hex()]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def in_ranks(
    count: int,
    function: Callable[..., Any],
    folder: Path,
    *arguments: Any,
    codes: Sequence[int] = (),
    error: str = "",
) -> list[Any]:
    """Returns what the function returns in each of `count` processes; it may call `Ranks.join`.

    `codes` are the expected exit codes, 0 if not given; a process with another result has None. `error` is part of
    what the processes write on standard error.
    """
    results = [folder / f"result-{rank}" for rank in range(count)]
    with ring(count, folder) as environments:
        processes = [start(function, arguments, *each, count) for each in zip(results, environments, strict=True)]
        try:
            errors = [process.communicate(timeout=HANG_S)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    ended = [process.returncode for process in processes]
    assert ended == list(codes or [0] * count) and error in "".join(errors), "\n".join(errors)
    return [pickle.loads(each.read_bytes()) if each.exists() else None for each in results]


if __name__ == "__main__":
    module, name, arguments, result, among = pickle.loads(bytes.fromhex(sys.argv[1]))
    speed_up_mlx(ROOT / ".pytest_cache" / "accelerator")
    prepare(ROOT / ".pytest_cache" / "accelerator")
    called = getattr(importlib.import_module(module), name)
    # MLX gives up if a rank comes half a minute after another, as on a machine with much other work.
    result.with_suffix(".ready").touch()
    wait_until(lambda: len(list(result.parent.glob("*.ready"))) >= among)
    result.write_bytes(pickle.dumps(called(*arguments)))
