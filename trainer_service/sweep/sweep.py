"""A sweep: queues its candidates, and carries out what is decided between their rungs.

A `Sweep` stores nothing: its decisions follow from the jobs, from `until` of each, and from whether it waits there or
has ended. So the process may be killed at any moment, and another one goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import AlreadyExists, InvalidArgument, NotFound, shown
from shared.registry.registry import Registry
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.specs import Kind, TrainSpec
from trainer_service.jobs.submit import on_this_machine, release_ended, submit
from trainer_service.sweep.grid import Member
from trainer_service.sweep.halving import Candidate, Decision, Halving, Standing


@dataclass(frozen=True)
class Turn:
    """What a sweep has seen and done: the jobs of its candidates, in their order, and the decision."""

    jobs: tuple[JobRecord, ...]
    decision: Decision

    @property
    def is_over(self) -> bool:
        """Whether no candidate trains any more."""
        return all(job.state.is_final for job in self.jobs)


class Sweep:
    """A sweep of some members. `data` is the folder of data of this machine.

    Methods raise `Unavailable` if Redis does not answer.
    """

    def __init__(
        self, name: str, members: Sequence[Member], halving: Halving, queue: JobQueue, registry: Registry, data: Path
    ) -> None:
        self.name = name
        self.members = tuple(members)
        self.halving = halving
        self._queue = queue
        self._registry = registry
        self._data = data
        self._ids: list[str] = []
        self._marked: set[str] = set()

    def begin(self) -> int:
        """Queues the candidates that have no job yet, and returns how many have one already.

        Raises `InvalidArgument` if the sweep has begun with other values, `AlreadyExists` if its name is taken, and the
        errors of `submit`.
        """
        found = self._find()
        for member in self.members:
            if member.spec.run in found:
                _require_same(self.name, member, found[member.spec.run])
            elif self._registry.has_begun(member.spec.run):
                raise AlreadyExists(
                    f"The registry has a run named {shown(member.spec.run)} already, and no job of it is left; choose "
                    "another --name."
                )
        begun = [_candidate(each.number, found[each.spec.run]) for each in self.members if each.spec.run in found]
        self.halving.require_possible(begun)
        if len(begun) < len(self.members) and any(each.until > self.halving.first for each in begun):
            raise self._other_number(len(begun))
        for member in self.members:
            if member.spec.run not in found:
                # A set of stories may grow between two of the runs.
                first = next((job.spec for job in found.values()), None)
                stories = first.stories if isinstance(first, TrainSpec) else None
                spec = on_this_machine(member.spec, (), self._data, self._queue.store, stories)
                assert isinstance(spec, TrainSpec)
                spec = replace(spec, until=self.halving.first)
                found[member.spec.run] = submit(spec, self._queue, self._registry)
        self._ids = [found[member.spec.run].id for member in self.members]
        return len(begun)

    def _find(self) -> dict[str, JobRecord]:
        """Returns the newest job of each candidate that has one, by its run."""
        count = len(self.members)
        names = {f"{self.name}-{number}" for number in range(1, count + 2)}
        found = dict[str, JobRecord]()
        for job in self._queue.store.jobs(kinds=[Kind.TRAIN]):
            if isinstance(job.spec, TrainSpec) and job.spec.run in names:
                found.setdefault(job.spec.run, job)
        beyond = found.pop(f"{self.name}-{count + 1}", None)
        if beyond is not None and isinstance(beyond.spec, TrainSpec) and beyond.spec.until is not None:
            raise self._other_number(f"more than {count}")
        return found

    def _other_number(self, begun: int | str) -> InvalidArgument:
        count = len(self.members)
        return InvalidArgument(
            f"The sweep {self.name} has begun with {begun} candidates, but this command names {count}: give the "
            "command with which it began, or another --name."
        )

    def jobs(self) -> tuple[JobRecord, ...]:
        """Returns the jobs of the candidates; raises `NotFound` if one of them is gone."""
        found = self._queue.store.read(self._ids)
        for job_id, job in zip(self._ids, found, strict=True):
            if job is None:
                raise NotFound(f"The job {job_id} of the sweep {self.name} is gone from Redis, so it cannot go on.")
        return tuple(job for job in found if job is not None)

    def turn(self) -> Turn:
        """Looks at the candidates and does what is due.

        Raises `NotFound` if a job is gone, and `FailedPrecondition` if the registry cannot be written.
        """
        jobs = self.jobs()
        decision = self.halving.decide([_candidate(number, job) for number, job in enumerate(jobs, start=1)])
        for number in decision.go_on:
            self._queue.extend(jobs[number - 1], decision.until)
        for number in decision.stop:
            job = jobs[number - 1]
            assert isinstance(job.spec, TrainSpec)
            self._queue.stop(job, f"Others of the sweep {self.name} have a lower loss at step {job.spec.last_step:,}.")
        if decision.stop:
            release_ended(self._queue, self._registry)
        self._mark_cancelled(self.jobs() if decision.stop else jobs)
        return Turn(jobs, decision)

    def _mark_cancelled(self, jobs: Sequence[JobRecord]) -> None:
        """Marks the runs of cancelled candidates as finished; a process may have been killed before it could."""
        for member, job in zip(self.members, jobs, strict=True):
            run = member.spec.run
            # Only the last state of a finished run is kept, and of few such runs.
            if job.state is JobState.CANCELLED and job.evaluation and run not in self._marked:
                self._registry.end_run(run)
                self._marked.add(run)


def _candidate(number: int, job: JobRecord) -> Candidate:
    assert isinstance(job.spec, TrainSpec)
    until, measured = job.spec.last_step, job.evaluation
    standing = Standing.ENDED if job.state.is_final else Standing.WAITS if job.is_suspended else Standing.TRAINS
    loss = measured.validation_loss if measured and measured.step == until else None
    return Candidate(number, until, standing, loss)


def _require_same(name: str, member: Member, job: JobRecord) -> None:
    """Raises if the job is not that of a candidate with these values."""
    assert isinstance(job.spec, TrainSpec)
    if job.spec.until is None:
        raise AlreadyExists(
            f"The job {job.id} has a run named {shown(job.spec.run)} already, which is not a candidate of a sweep; "
            "choose another --name."
        )
    wanted, begun = member.spec, job.spec
    if (wanted.config, wanted.data, wanted.preset) == (begun.config, begun.data, begun.preset):
        return
    ours, theirs = wanted.config.to_dict(), begun.config.to_dict()
    differing = [f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if ours[key] != theirs[key]]
    raise InvalidArgument(
        f"The sweep {name} has begun with {differing[0] if differing else 'another text or preset'} in candidate "
        f"{member.number}: give the command with which it began, or another --name."
    )
