import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_CANCELLING: _ClassVar[JobState]
    JOB_STATE_FINISHED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]

class JobKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_KIND_UNSPECIFIED: _ClassVar[JobKind]
    JOB_KIND_PREPARE: _ClassVar[JobKind]
    JOB_KIND_TRAIN: _ClassVar[JobKind]
    JOB_KIND_EVALUATE: _ClassVar[JobKind]
    JOB_KIND_STORIES: _ClassVar[JobKind]
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_CANCELLING: JobState
JOB_STATE_FINISHED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
JOB_KIND_UNSPECIFIED: JobKind
JOB_KIND_PREPARE: JobKind
JOB_KIND_TRAIN: JobKind
JOB_KIND_EVALUATE: JobKind
JOB_KIND_STORIES: JobKind

class EnqueueJobRequest(_message.Message):
    __slots__ = ("preset", "dataset", "validation", "resume", "overrides", "kind", "after", "version", "name", "notes", "window", "pairs", "again", "speed", "teachers", "force", "rivals", "promote", "judge_usd", "count", "max_cost_usd", "needs")
    class OverridesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class RivalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PRESET_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    RIVALS_FIELD_NUMBER: _ClassVar[int]
    PROMOTE_FIELD_NUMBER: _ClassVar[int]
    JUDGE_USD_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_USD_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    preset: str
    dataset: _containers.RepeatedScalarFieldContainer[str]
    validation: _containers.RepeatedScalarFieldContainer[str]
    resume: int
    overrides: _containers.ScalarMap[str, str]
    kind: JobKind
    after: _containers.RepeatedScalarFieldContainer[str]
    version: str
    name: str
    notes: str
    window: int
    pairs: _containers.RepeatedScalarFieldContainer[str]
    again: bool
    speed: bool
    teachers: _containers.RepeatedScalarFieldContainer[str]
    force: bool
    rivals: _containers.ScalarMap[str, str]
    promote: bool
    judge_usd: float
    count: int
    max_cost_usd: float
    needs: str
    def __init__(self, preset: _Optional[str] = ..., dataset: _Optional[_Iterable[str]] = ..., validation: _Optional[_Iterable[str]] = ..., resume: _Optional[int] = ..., overrides: _Optional[_Mapping[str, str]] = ..., kind: _Optional[_Union[JobKind, str]] = ..., after: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., name: _Optional[str] = ..., notes: _Optional[str] = ..., window: _Optional[int] = ..., pairs: _Optional[_Iterable[str]] = ..., again: _Optional[bool] = ..., speed: _Optional[bool] = ..., teachers: _Optional[_Iterable[str]] = ..., force: _Optional[bool] = ..., rivals: _Optional[_Mapping[str, str]] = ..., promote: _Optional[bool] = ..., judge_usd: _Optional[float] = ..., count: _Optional[int] = ..., max_cost_usd: _Optional[float] = ..., needs: _Optional[str] = ...) -> None: ...

class EnqueueJobResponse(_message.Message):
    __slots__ = ("job", "live_workers")
    JOB_FIELD_NUMBER: _ClassVar[int]
    LIVE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    job: Job
    live_workers: int
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., live_workers: _Optional[int] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("states", "page_size", "page_token", "kinds")
    STATES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedScalarFieldContainer[JobState]
    page_size: int
    page_token: str
    kinds: _containers.RepeatedScalarFieldContainer[JobKind]
    def __init__(self, states: _Optional[_Iterable[_Union[JobState, str]]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., kinds: _Optional[_Iterable[_Union[JobKind, str]]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("time", "state_changed", "run_started", "progress", "evaluation", "version_published", "notice", "preparation")
    TIME_FIELD_NUMBER: _ClassVar[int]
    STATE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    RUN_STARTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    PREPARATION_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    state_changed: StateChanged
    run_started: RunStarted
    progress: Progress
    evaluation: Evaluation
    version_published: VersionPublished
    notice: Notice
    preparation: Preparation
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state_changed: _Optional[_Union[StateChanged, _Mapping]] = ..., run_started: _Optional[_Union[RunStarted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., version_published: _Optional[_Union[VersionPublished, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., preparation: _Optional[_Union[Preparation, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "run", "state", "preset", "dataset", "enqueued_at", "started_at", "ended_at", "progress", "reason", "kind", "after", "attempt", "version", "evaluation", "notes", "jobs_ahead", "best_evaluation", "needs", "awaited")
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    ENQUEUED_AT_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    JOBS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    BEST_EVALUATION_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    id: str
    run: str
    state: JobState
    preset: str
    dataset: _containers.RepeatedScalarFieldContainer[str]
    enqueued_at: _timestamp_pb2.Timestamp
    started_at: _timestamp_pb2.Timestamp
    ended_at: _timestamp_pb2.Timestamp
    progress: Progress
    reason: str
    kind: JobKind
    after: _containers.RepeatedScalarFieldContainer[str]
    attempt: int
    version: str
    evaluation: Evaluation
    notes: str
    jobs_ahead: int
    best_evaluation: Evaluation
    needs: str
    awaited: str
    def __init__(self, id: _Optional[str] = ..., run: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., preset: _Optional[str] = ..., dataset: _Optional[_Iterable[str]] = ..., enqueued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., reason: _Optional[str] = ..., kind: _Optional[_Union[JobKind, str]] = ..., after: _Optional[_Iterable[str]] = ..., attempt: _Optional[int] = ..., version: _Optional[str] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., notes: _Optional[str] = ..., jobs_ahead: _Optional[int] = ..., best_evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., needs: _Optional[str] = ..., awaited: _Optional[str] = ...) -> None: ...

class StateChanged(_message.Message):
    __slots__ = ("state", "reason")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    state: JobState
    reason: str
    def __init__(self, state: _Optional[_Union[JobState, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class RunStarted(_message.Message):
    __slots__ = ("parameters", "embedding_parameters", "train_tokens", "validation_tokens", "tokenizer", "first_step", "max_steps", "device", "first_tokens", "preparation_seconds", "memory_limit_bytes")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREPARATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    parameters: int
    embedding_parameters: int
    train_tokens: int
    validation_tokens: int
    tokenizer: str
    first_step: int
    max_steps: int
    device: str
    first_tokens: int
    preparation_seconds: float
    memory_limit_bytes: int
    def __init__(self, parameters: _Optional[int] = ..., embedding_parameters: _Optional[int] = ..., train_tokens: _Optional[int] = ..., validation_tokens: _Optional[int] = ..., tokenizer: _Optional[str] = ..., first_step: _Optional[int] = ..., max_steps: _Optional[int] = ..., device: _Optional[str] = ..., first_tokens: _Optional[int] = ..., preparation_seconds: _Optional[float] = ..., memory_limit_bytes: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "max_steps", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "tokens", "eta_seconds", "best_validation_loss", "active_memory_bytes", "cache_memory_bytes", "peak_memory_bytes", "resident_memory_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BEST_VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    max_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    tokens: int
    eta_seconds: float
    best_validation_loss: float
    active_memory_bytes: int
    cache_memory_bytes: int
    peak_memory_bytes: int
    resident_memory_bytes: int
    def __init__(self, step: _Optional[int] = ..., max_steps: _Optional[int] = ..., loss: _Optional[float] = ..., learning_rate: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., tokens: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., best_validation_loss: _Optional[float] = ..., active_memory_bytes: _Optional[int] = ..., cache_memory_bytes: _Optional[int] = ..., peak_memory_bytes: _Optional[int] = ..., resident_memory_bytes: _Optional[int] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("step", "training_loss", "validation_loss", "bits_per_byte", "version", "windows", "text", "method_digest")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TRAINING_LOSS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    METHOD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    step: int
    training_loss: float
    validation_loss: float
    bits_per_byte: float
    version: int
    windows: int
    text: str
    method_digest: str
    def __init__(self, step: _Optional[int] = ..., training_loss: _Optional[float] = ..., validation_loss: _Optional[float] = ..., bits_per_byte: _Optional[float] = ..., version: _Optional[int] = ..., windows: _Optional[int] = ..., text: _Optional[str] = ..., method_digest: _Optional[str] = ...) -> None: ...

class VersionPublished(_message.Message):
    __slots__ = ("version", "step", "validation_loss", "bits_per_byte", "best")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    step: int
    validation_loss: float
    bits_per_byte: float
    best: bool
    def __init__(self, version: _Optional[int] = ..., step: _Optional[int] = ..., validation_loss: _Optional[float] = ..., bits_per_byte: _Optional[float] = ..., best: _Optional[bool] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class Preparation(_message.Message):
    __slots__ = ("stage", "fraction")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    stage: str
    fraction: float
    def __init__(self, stage: _Optional[str] = ..., fraction: _Optional[float] = ...) -> None: ...
