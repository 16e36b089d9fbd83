"""A launcher, and each of its ranks, whose watchdog ends a rank after two seconds: `impatient.py 2 PYTHON -m … JOB`."""

import os
import sys

from trainer_service.ranks import coordinator, watchdog

if sys.argv[1] == "rank":
    from trainer_service.__main__ import app

    watchdog.LEAST_S = 2.0
    sys.argv[1:] = sys.argv[1:]
    app()
else:
    job, attempt = sys.argv[-2:]
    programs = [
        coordinator.Command(each.name, [sys.executable, __file__, "rank", job, attempt], each.environment)
        for each in coordinator.commands(job, int(attempt), int(sys.argv[1]), (), os.environ, ())
    ]
    reason = coordinator.run_ranks(programs, bool, bool)
    print(reason, flush=True)
    sys.exit(bool(reason))
