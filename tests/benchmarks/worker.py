"""The process of one peer. It builds its implementation, then takes steps for each line of standard input, which gives
the least number of steps and the least seconds."""

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
        # Running threads would keep the process alive.
        if hasattr(measured, "end"):
            measured.end()


def resident_peak() -> int:
    """Returns the peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # Ctrl-C also reaches the measuring process, which reports it.
        sys.exit(128 + signal.SIGINT)
