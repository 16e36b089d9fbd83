"""What RQ carries: attempts at jobs, and nothing else."""

import logging
from typing import Any

from rq.exceptions import NoSuchJobError
from rq.job import Job

logger = logging.getLogger(__name__)

# What RQ holds as the function of every attempt; the worker calls nothing by its name.
JOB_FUNCTION = "trainer_service.job_process.run_attempt"


class AttemptJob(Job):
    """What RQ reads of an attempt. Anything but the one function with a job and a number is none: RQ imports and calls
    what it reads, callbacks too."""

    def restore(self, raw_data: Any) -> Any:
        """As RQ has it; raises `NoSuchJobError`, on which RQ drops the job."""
        try:
            super().restore(raw_data)
            calls = (b"success_callback_name", b"failure_callback_name", b"stopped_callback_name", b"webhooks")
            understood = (
                self.func_name == JOB_FUNCTION
                and self.instance is None
                and not self.kwargs
                and not any(raw_data.get(name) for name in calls)
                and [type(argument) for argument in self.args] == [str, int]
            )
        except Exception as error:
            raise NoSuchJobError(f"{self.id} cannot be understood: {error!r}") from error
        if not understood:
            logger.error("%r in the queue is not a job of this project, and is dropped", self.id)
            raise NoSuchJobError(f"{self.id} is not a job of this project.")
