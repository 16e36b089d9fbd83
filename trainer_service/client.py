"""A Python client of the trainer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from shared.errors import DeadlineExceeded, GptloopError
from shared.pb.training.v1 import training_pb2 as pb
from shared.pb.training.v1 import training_pb2_grpc
from shared.service.access.credentials import PLAIN, Credentials
from shared.service.client_channel import Connection, sendable
from shared.service.grpc_status import error_of
from trainer_service.jobs.events import JobState
from trainer_service.jobs.requests import JobRequest
from trainer_service.jobs.specs import Kind
from trainer_service.translate import KINDS, STATES, request_to_pb

_CALL_S = 30.0


class TrainerClient(Connection):
    """One connection to a trainer, `host:port`. Calls may run on several threads.

    Every method raises the error of `shared.errors` that the server raised, `Unavailable` if no server answers, and
    `DeadlineExceeded` if the call takes longer than `timeout_s`. No call is repeated: a job would be queued twice.
    """

    def __init__(self, address: str, timeout_s: float = _CALL_S, credentials: Credentials = PLAIN) -> None:
        super().__init__(address, credentials)
        self._timeout_s = timeout_s
        self._stub: Any = training_pb2_grpc.TrainingServiceStub(self._channel)

    def submit(self, request: JobRequest) -> pb.EnqueueJobResponse:
        """Queues a job; the answer has the job and the number of live workers."""
        with sendable():
            message = request_to_pb(request)
        response: pb.EnqueueJobResponse = self._call(self._stub.EnqueueJob, message)
        return response

    def job(self, job_id: str) -> pb.Job:
        """Returns the current state of a job."""
        job: pb.Job = self._call(self._stub.GetJob, pb.GetJobRequest(job_id=job_id)).job
        return job

    def jobs(self, states: Sequence[JobState] = (), kinds: Sequence[Kind] = ()) -> Iterator[pb.Job]:
        """Yields the jobs, the newest first; `states` and `kinds` select some of them."""
        request = pb.ListJobsRequest(states=[STATES[state] for state in states], kinds=[KINDS[kind] for kind in kinds])
        while True:
            page = self._call(self._stub.ListJobs, request)
            yield from page.jobs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch(self, job_id: str, timeout_s: float | None = None) -> Iterator[pb.WatchJobResponse]:
        """Yields every event of a job until it ends; without `timeout_s` it may take any time."""
        request = pb.WatchJobRequest(job_id=job_id)
        call = self._stub.WatchJob(request, timeout=timeout_s, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as failure:
            raise self._error_of(failure, timeout_s) from None
        finally:
            call.cancel()

    def cancel(self, job_id: str) -> pb.Job:
        """Cancels a job; a running one ends after its step."""
        job: pb.Job = self._call(self._stub.CancelJob, pb.CancelJobRequest(job_id=job_id)).job
        return job

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            raise self._error_of(failure, self._timeout_s) from None

    def _error_of(self, failure: grpc.RpcError, timeout_s: float | None) -> GptloopError:
        error = error_of(failure, self._address, "gptloop up")
        if isinstance(error, DeadlineExceeded) and timeout_s is not None:
            return DeadlineExceeded(f"The call to {self._address} did not end within {timeout_s:g} s.")
        return error
