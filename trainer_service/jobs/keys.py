"""Names in Redis. All of them carry the id of a registry, so that several can share one Redis.

gptloop:<registry>:jobs            sorted set of job ids, by their place: 1 for the first that was ever enqueued
gptloop:<registry>:open            the same of those that have not ended
gptloop:<registry>:job:<id>        hash: kind, spec, run, after, state, attempt, times, reason, the last of some events
gptloop:<registry>:events:<id>     stream of everything that the job told
gptloop:<registry>:lease:<id>      the attempt that makes progress, there while it does
gptloop:<registry>:workers         set of the names of workers
gptloop:<registry>:worker:<name>   there while a worker lives
gptloop:<registry>:tokens          tokens that all jobs ever trained on
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """The names of one registry, by its id."""

    registry: str

    @property
    def queue_name(self) -> str:
        """What RQ calls the queue; its own names follow from it."""
        return f"gptloop-{self.registry}"

    @property
    def jobs(self) -> str:
        """Every job by its place."""
        return self._name("jobs")

    @property
    def open(self) -> str:
        """The jobs that have not ended, by their place."""
        return self._name("open")

    @property
    def workers(self) -> str:
        """The names of workers."""
        return self._name("workers")

    @property
    def tokens(self) -> str:
        """The tokens that all jobs ever trained on."""
        return self._name("tokens")

    def job(self, job_id: str) -> str:
        """How a job stands."""
        return self._name(f"job:{job_id}")

    def events(self, job_id: str) -> str:
        """What a job told."""
        return self._name(f"events:{job_id}")

    def lease(self, job_id: str) -> str:
        """The attempt at a job that makes progress."""
        return self._name(f"lease:{job_id}")

    def worker(self, name: str) -> str:
        """There while a worker lives."""
        return self._name(f"worker:{name}")

    def _name(self, rest: str) -> str:
        return f"gptloop:{self.registry}:{rest}"
