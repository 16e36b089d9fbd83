"""The names of the keys in Redis. Each contains the id of the registry, so that several registries can share one Redis.

gptloop:<registry>:jobs            sorted set of job ids by their tickets, which number the jobs from 1
gptloop:<registry>:open            the same for the jobs that have not ended
gptloop:<registry>:job:<id>        hash: kind, spec, run, after, state, attempt, times, reason, the last of some events
gptloop:<registry>:events:<id>     stream of all events of a job
gptloop:<registry>:lease:<id>      the attempt that makes progress; expires unless it is renewed
gptloop:<registry>:workers         set of the names of workers
gptloop:<registry>:worker:<name>   expires unless the worker renews it
gptloop:<registry>:tokens          number of tokens that all jobs ever trained on
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """The keys of one registry, given by its id."""

    registry: str

    @property
    def queue_name(self) -> str:
        """The name of RQ's queue, from which RQ derives its own keys."""
        return f"gptloop-{self.registry}"

    @property
    def jobs(self) -> str:
        """Every job by its ticket."""
        return self._name("jobs")

    @property
    def open(self) -> str:
        """The jobs that have not ended, by their tickets."""
        return self._name("open")

    @property
    def workers(self) -> str:
        """The names of workers."""
        return self._name("workers")

    @property
    def tokens(self) -> str:
        """The number of tokens that all jobs ever trained on."""
        return self._name("tokens")

    def job(self, job_id: str) -> str:
        """The fields of a job."""
        return self._name(f"job:{job_id}")

    def events(self, job_id: str) -> str:
        """The events of a job."""
        return self._name(f"events:{job_id}")

    def lease(self, job_id: str) -> str:
        """The lease of a job's attempt."""
        return self._name(f"lease:{job_id}")

    def worker(self, name: str) -> str:
        """The lease of a worker."""
        return self._name(f"worker:{name}")

    def _name(self, rest: str) -> str:
        return f"gptloop:{self.registry}:{rest}"
