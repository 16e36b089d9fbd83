"""The names of the keys in Redis."""


class Keys:
    """The keys of one registry, given by its id, which each of them contains: several registries can share one Redis.

    queue_name: the name of RQ's queue, from which RQ derives its own keys.
    jobs: sorted set of job ids by their tickets, which number the jobs from 1.
    open: the same for the jobs that have not ended.
    workers: set of the names of workers.
    sent: stream whose last entry is new whenever an attempt was handed to the workers.
    tokens: number of tokens that all jobs ever trained on.
    diverged: number of jobs that ever failed because their loss was not finite.
    restored: the hash of the backup that the jobs were restored from.
    """

    def __init__(self, registry: str) -> None:
        self.registry = registry
        self.queue_name = f"gptloop-{registry}"
        self.jobs = f"gptloop:{registry}:jobs"
        self.open = f"gptloop:{registry}:open"
        self.workers = f"gptloop:{registry}:workers"
        self.sent = f"gptloop:{registry}:sent"
        self.tokens = f"gptloop:{registry}:tokens"
        self.diverged = f"gptloop:{registry}:diverged"
        self.restored = f"gptloop:{registry}:restored"

    def job(self, job_id: str) -> str:
        """Hash: kind, spec, run, after, state, attempt, sent, times, reason, the last of some events."""
        return f"gptloop:{self.registry}:job:{job_id}"

    def events(self, job_id: str) -> str:
        """Stream of all events of a job."""
        return f"gptloop:{self.registry}:events:{job_id}"

    def lease(self, job_id: str) -> str:
        """The lease of the attempt that makes progress; expires unless it is renewed."""
        return f"gptloop:{self.registry}:lease:{job_id}"

    def worker(self, name: str) -> str:
        """The lease of a worker, with what it offers; expires unless it is renewed."""
        return f"gptloop:{self.registry}:worker:{name}"
