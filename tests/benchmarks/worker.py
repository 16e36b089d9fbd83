"""The process of one peer: builds what it is to measure, then takes steps for each line of its input, which says how
many at least and for how many seconds at least."""

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
            least = json.loads(line)
            steps, start_s = 0, time.perf_counter()
            while steps < least["steps"] or time.perf_counter() - start_s < least["seconds"]:
                measured.step()
                steps += 1
            measured.wait()
            step_s = (time.perf_counter() - start_s) / steps
            print(json.dumps({"step_s": step_s, "peak_bytes": measured.peak_bytes()}), flush=True)
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
