"""The process of one peer: builds what it is to measure, then takes as many steps as each line of its input says."""

import importlib
import json
import resource
import signal
import sys
import time


def main() -> None:
    task, peer, specification = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    module = importlib.import_module(f"tests.benchmarks.peers.{peer.partition(' ')[0].replace('-', '_')}")
    measured = getattr(module, task)(variant=peer.partition(" ")[2], **specification)
    try:
        for line in sys.stdin:
            start_s = time.perf_counter()
            for _ in range(int(line)):
                measured.step()
            measured.wait()
            seconds = time.perf_counter() - start_s
            print(json.dumps({"seconds": seconds, "peak_bytes": measured.peak_bytes()}), flush=True)
    finally:
        # Threads that go on would keep the process.
        if hasattr(measured, "end"):
            measured.end()


def resident_peak() -> int:
    """The most memory in bytes that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # Ctrl-C reaches whoever measures too, who says so.
        sys.exit(128 + signal.SIGINT)
