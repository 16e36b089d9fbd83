"""The metrics of the inference service, all of them."""

import time
from collections import deque
from collections.abc import Callable, Iterator

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inference_service.engine.request import FinishReason
from shared.device.accelerator import Memory
from shared.pb.inference.v1 import inference_pb2
from shared.registry.manifest import VersionManifest

# Half a millisecond apart where a decode step takes a few, wider above.
_STEP_BUCKETS = (
    *(0.0005 * count for count in range(1, 21)),
    *(0.0125, 0.015, 0.0175, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
_SWAP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_FIRST_TOKEN_BUCKETS = (*_STEP_BUCKETS, 5.0, 10.0, 30.0)
# How a request ends: by finish reason, or by the status code of its error.
_ENDS = tuple(
    dict.fromkeys(
        end.lower()
        for end in (
            *(reason.name for reason in FinishReason),
            *("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNAVAILABLE"),
            *("DEADLINE_EXCEEDED", "DATA_LOSS", "INTERNAL"),
        )
    )
)
# Why a version is refused.
_REFUSALS = ("corrupt", "unfit", "not_finite", "lying", "worse", "failing", "rolled_back")
# The span over which tokens per second are counted.
_RATE_WINDOW_S = 3.0


class InferenceMetrics:
    """Counts what the service does, in a collector registry that is passed in. Not thread-safe but for the page."""

    def __init__(
        self,
        registry: CollectorRegistry,
        memory: Callable[[], Memory],
        compiled_shapes: Callable[[], int],
        active_streams: Callable[[], int],
    ) -> None:
        def name(suffix: str) -> str:
            return f"gptloop_inference_{suffix}"

        # A version from before this server cannot tell how long a swap takes.
        self._since = time.time()
        self._rate = TokenRate()
        self._generated = Counter(name("generated_tokens_total"), "Tokens that were generated.", registry=registry)
        self._prompt = Counter(name("prompt_tokens_total"), "Prompt tokens of accepted requests.", registry=registry)
        self._cached = Counter(
            name("cached_prompt_tokens_total"),
            "Prompt tokens that were not read again, as an earlier prompt began with them.",
            registry=registry,
        )
        Gauge(
            name("tokens_per_second"),
            f"Tokens generated a second, over the last {_RATE_WINDOW_S:g} s.",
            registry=registry,
        ).set_function(self._rate.read)
        self._first_token = Histogram(
            name("time_to_first_token_seconds"),
            "From the arrival of a request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._inter_token = Histogram(
            name("inter_token_latency_seconds"),
            "From one token of a stream to the next.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._requests = Counter(
            name("requests_total"), "Generate requests that ended, by how they ended.", ["reason"], registry=registry
        )
        self._calls = Counter(
            name("calls_total"), "Calls that ended, by method and status code.", ["method", "code"], registry=registry
        )
        for service in inference_pb2.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                self._calls.labels(method.name, "ok")
        Gauge(name("active_streams"), "Streams that have a slot.", registry=registry).set_function(active_streams)
        self.waiting_requests = Gauge(name("waiting_requests"), "Samples that wait for a slot.", registry=registry)
        memory_bytes = Gauge(
            name("memory_bytes"),
            "Memory: active and cached by MLX, its peak, and resident in this process.",
            ["kind"],
            registry=registry,
        )
        for kind in ("active", "cache", "peak", "resident"):
            memory_bytes.labels(kind).set_function(lambda kind=kind: getattr(memory(), f"{kind}_bytes"))  # type: ignore[misc]
        Gauge(
            name("compiled_shapes"),
            "Programs that were compiled; no request adds one.",
            registry=registry,
        ).set_function(compiled_shapes)
        self._models = _Models(name("model_info"))
        registry.register(self._models)
        self._swaps = Counter(
            name("swaps_total"), "Times that another version took over as the serving one.", registry=registry
        )
        self._swap_seconds = Histogram(
            name("swap_duration_seconds"),
            "From the moment at which a version should serve to the one at which it does.",
            buckets=_SWAP_BUCKETS,
            registry=registry,
        )
        self._commit_to_serving = Histogram(
            name("commit_to_serving_seconds"),
            "From the commit of a version to the moment from which on it answers new requests.",
            buckets=_SWAP_BUCKETS,
            registry=registry,
        )
        self._refused = Counter(
            name("refused_versions_total"), "Versions that were refused, by why.", ["reason"], registry=registry
        )
        for metric, known in ((self._requests, _ENDS), (self._refused, _REFUSALS)):
            for reason in known:
                metric.labels(reason)
        # These are of versions in memory only: what is gone leaves the page.
        self._version_streams = Gauge(
            name("version_streams"), "Requests that a version in memory answers.", ["version"], registry=registry
        )
        self._version_requests = Counter(
            name("version_requests_total"),
            "Requests to a version in memory that ended, by how they ended.",
            ["version", "reason"],
            registry=registry,
        )
        self._version_tokens = Counter(
            name("version_generated_tokens_total"),
            "Tokens that a version in memory has generated.",
            ["version"],
            registry=registry,
        )
        self._version_first_token = Summary(
            name("version_time_to_first_token_seconds"),
            "From the arrival of a request to a version in memory to its first token.",
            ["version"],
            registry=registry,
        )
        self._version_inter_token = Summary(
            name("version_inter_token_latency_seconds"),
            "From one token of a stream of a version in memory to the next.",
            ["version"],
            registry=registry,
        )
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def accepted(self, prompt_tokens: int) -> None:
        """A request was encoded and handed to the engine."""
        self._prompt.inc(prompt_tokens)

    def token(self, version: int, arrived: float, last_at: float | None, at: float) -> None:
        """A version generated a token `at` a time; the one before it in its stream `last_at`, if there was one."""
        self._generated.inc()
        self._rate.add()
        self._version_tokens.labels(version).inc()
        if last_at is None:
            self._first_token.observe(at - arrived)
            self._version_first_token.labels(version).observe(at - arrived)
        else:
            self._inter_token.observe(at - last_at)
            self._version_inter_token.labels(version).observe(at - last_at)

    def cached(self, cached_prompt_tokens: int) -> None:
        """So many tokens of a request's prompt were not read again."""
        self._cached.inc(cached_prompt_tokens)

    def called(self, method: str, code: grpc.StatusCode, reason: str | None) -> None:
        """A call ended; of Generate, `reason` is how its last sample ended, None if an error ended it."""
        self._calls.labels(method, code.name.lower()).inc()
        if method == "Generate":
            self._requests.labels((reason or code.name).lower()).inc()

    def answered(self, version: int, reason: str) -> None:
        """A version's answer to a Generate call ended, in the same words."""
        self._version_requests.labels(version, reason.lower()).inc()

    def streams(self, version: int, streams: int) -> None:
        """So many requests are answered by a version now."""
        self._version_streams.labels(version).set(streams)

    def serves(self, manifest: VersionManifest, seconds: float, *, swap: bool, first: bool) -> None:
        """A version serves, so long after it should: in the place of another one, for the first time."""
        if swap:
            self._swaps.inc()
            self._swap_seconds.observe(seconds)
        if first and manifest.created_at > self._since:
            # Another process committed it, so only the wall clock compares; it may step back.
            self._commit_to_serving.observe(max(0.0, time.time() - manifest.created_at))

    def refused(self, reason: str) -> None:
        """A version was found unfit to serve."""
        self._refused.labels(reason).inc()

    def resident(self, versions: list[VersionManifest], serving: int | None) -> None:
        """Says which versions are in memory, all others being gone."""
        before = {manifest.version for manifest in self._models.versions}
        self._models.show(tuple(versions), serving)
        for manifest in versions:
            # What has not been counted yet is 0, not absent.
            for metric in (
                self._version_streams,
                self._version_tokens,
                self._version_first_token,
                self._version_inter_token,
            ):
                metric.labels(manifest.version)
            for reason in _ENDS:
                self._version_requests.labels(manifest.version, reason)
        for number in before - {manifest.version for manifest in versions}:
            self._forget(number)

    def _forget(self, version: int) -> None:
        for metric in (
            self._version_streams,
            self._version_requests,
            self._version_tokens,
            self._version_first_token,
            self._version_inter_token,
        ):
            metric.remove_by_labels({"version": str(version)})


class _Models(Collector):
    """The versions in memory, replaced all at once: no page shows two that serve."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown: tuple[tuple[VersionManifest, ...], int | None] = ((), None)

    @property
    def versions(self) -> tuple[VersionManifest, ...]:
        """Those that the page shows."""
        return self._shown[0]

    def show(self, versions: tuple[VersionManifest, ...], serving: int | None) -> None:
        """What the page shows from now on."""
        self._shown = (versions, serving)

    def collect(self) -> Iterator[Metric]:
        """The series of the moment."""
        versions, serving = self._shown
        family = GaugeMetricFamily(
            self._name,
            "1 for each version in memory; serving is true for the one that answers new requests.",
            labels=["version", "run", "step", "preset", "tokenizer", "parameters", "serving"],
        )
        for one in versions:
            numbers = (one.version, one.run, one.step, one.preset, one.tokenizer, one.parameters)
            # Text that comes from a manifest need not be text that a page can hold.
            values = [str(each).encode(errors="backslashreplace").decode() for each in numbers]
            family.add_metric([*values, str(one.version == serving).lower()], 1)
        yield family


class TokenRate:
    """Tokens a second over a sliding window, from counts in tenths of a second; 0 when idle."""

    _TICK_S = 0.1

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # (tick, tokens), written by the event loop and read by the page's threads: a deque's copy is atomic.
        self._counts: deque[tuple[int, int]] = deque(maxlen=round(_RATE_WINDOW_S / self._TICK_S) + 1)

    def add(self) -> None:
        """One more token now."""
        tick = int(self._clock() / self._TICK_S)
        count = self._counts.pop()[1] if self._counts and self._counts[-1][0] == tick else 0
        self._counts.append((tick, count + 1))

    def read(self) -> float:
        """The rate over the window that ends now."""
        oldest = (self._clock() - _RATE_WINDOW_S) / self._TICK_S
        return sum(count for tick, count in self._counts.copy() if tick > oldest) / _RATE_WINDOW_S
