"""All metrics of the inference service."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

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
from inference_service.versions.resident import Resident
from shared.device.accelerator import Memory
from shared.pb.inference.v1 import inference_pb2
from shared.registry.evaluations import Figures
from shared.registry.manifest import VersionManifest

# Half a millisecond apart up to 10 ms, the usual range of a decode step, and wider above.
_STEP_BUCKETS = (
    *(0.0005 * count for count in range(1, 21)),
    *(0.0125, 0.015, 0.0175, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
_SWAP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_FIRST_TOKEN_BUCKETS = (*_STEP_BUCKETS, 5.0, 10.0, 30.0)
# How a request ends: its finish reason, or the status code of its error.
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
_REFUSALS = ("corrupt", "unfit", "not_finite", "loss_mismatch", "worse", "failing", "rolled_back")
# The window over which tokens per second are averaged.
_RATE_WINDOW_S = 3.0
_NAMESPACE = "gptloop_inference"
# The digits that the label `method` shows of a digest.
_DIGITS = 12


class InferenceMetrics:
    """Records what the service does, in the given collector registry. Only reading the page is thread-safe."""

    def __init__(
        self,
        registry: CollectorRegistry,
        memory: Callable[[], Memory],
        compiled_shapes: Callable[[], int],
        active_streams: Callable[[], int],
        memory_limits: Mapping[str, int],
    ) -> None:
        counter = partial(Counter, namespace=_NAMESPACE, registry=registry)
        gauge = partial(Gauge, namespace=_NAMESPACE, registry=registry)
        histogram = partial(Histogram, namespace=_NAMESPACE, registry=registry)
        summary = partial(Summary, namespace=_NAMESPACE, registry=registry)
        self._collectors = registry
        # Versions committed before this server started say nothing about the time from commit to serving.
        self._since = time.time()
        self._rate = TokenRate()
        self._generated = counter("generated_tokens_total", "Generated tokens.")
        self._prompt = counter("prompt_tokens_total", "Prompt tokens of accepted requests.")
        self._cached = counter("cached_prompt_tokens_total", "Prompt tokens copied from the prefix cache.")
        gauge("tokens_per_second", f"Generated tokens per second over the last {_RATE_WINDOW_S:g} s.").set_function(
            self._rate.read
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "From one token of a stream to the next.", buckets=_STEP_BUCKETS
        )
        self._requests = counter(
            "requests_total",
            "Generate requests and completions over HTTP, by finish reason or status code.",
            ["reason"],
        )
        self._calls = counter("calls_total", "Calls by method and status code.", ["method", "code"])
        for service in inference_pb2.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                self._calls.labels(method.name, "ok")
        self._http = counter("http_requests_total", "Requests over HTTP by the status of their answer.", ["status"])
        self._http.labels(200)
        gauge("active_streams", "Streams that have a slot.").set_function(active_streams)
        self.waiting_requests = gauge("waiting_requests", "Samples that wait for a slot.")
        memory_bytes = gauge(
            "memory_bytes", "Memory by kind: active, cache and peak of MLX, and resident of this process.", ["kind"]
        )
        for kind in ("active", "cache", "peak", "resident"):
            memory_bytes.labels(kind).set_function(lambda kind=kind: getattr(memory(), f"{kind}_bytes"))  # type: ignore[misc]
        memory_limit_bytes = gauge(
            "memory_limit_bytes",
            "The most that this process may use by kind: resident memory, and active arrays on a GPU.",
            ["kind"],
        )
        for kind, limit_bytes in memory_limits.items():
            memory_limit_bytes.labels(kind).set(limit_bytes)
        gauge("compiled_shapes", "Compiled programs; no request adds one.").set_function(compiled_shapes)
        self._models = _Models()
        registry.register(self._models)
        self._swaps = counter("swaps_total", "Swaps of the serving version.")
        self._swap_seconds = histogram(
            "swap_duration_seconds", "From the choice of a version to the moment when it serves.", buckets=_SWAP_BUCKETS
        )
        self._commit_to_serving = histogram(
            "commit_to_serving_seconds",
            "From the commit of a version to the moment when it serves.",
            buckets=_SWAP_BUCKETS,
        )
        self._commit_to_first_token = histogram(
            "commit_to_first_token_seconds",
            "From the commit of a version to the first token that it generates.",
            buckets=_SWAP_BUCKETS,
        )
        # Versions without a token so far, and when they were committed.
        self._committed_at: dict[int, float] = {}
        self._healthy = gauge(
            "healthy", "1 if the health service says SERVING: a version serves, and steps do not stall."
        )
        self._refused = counter("refused_versions_total", "Refused versions by reason.", ["reason"])
        for metric, known in ((self._requests, _ENDS), (self._refused, _REFUSALS)):
            for reason in known:
                metric.labels(reason)
        # Series of versions that leave memory are removed.
        self._version_streams = gauge("version_streams", "Requests that a version is answering.", ["version"])
        self._version_requests = counter(
            "version_requests_total", "Requests to a version by finish reason or status code.", ["version", "reason"]
        )
        self._version_tokens = counter("version_generated_tokens_total", "Tokens generated by a version.", ["version"])
        self._version_first_token = summary(
            "version_time_to_first_token_seconds",
            "From the arrival of a request to its first token, by version.",
            ["version"],
        )
        self._version_inter_token = summary(
            "version_inter_token_latency_seconds", "From one token of a stream to the next, by version.", ["version"]
        )
        self._client_refusals = counter(
            "client_refusals_total", "Calls refused by a limit of their client: streams or tokens.", ["client", "limit"]
        )
        self._client_tokens = counter("client_tokens_total", "Tokens that a client has used.", ["client"])
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def accepted(self, prompt_tokens: int) -> None:
        """Counts the prompt of a request that the engine accepted."""
        self._prompt.inc(prompt_tokens)

    def tokens_of(self, version: int, arrived: float) -> Callable[[int, Sequence[float]], None]:
        """Returns what records the tokens of a request: those of a sample, by its number, generated at some times.

        The version stays in memory meanwhile: its series are looked up once.
        """
        generated = self._version_tokens.labels(version)
        first_token = self._version_first_token.labels(version)
        inter_token = self._version_inter_token.labels(version)
        last_at: dict[int, float] = {}

        def record(sample: int, times: Sequence[float]) -> None:
            self._generated.inc(len(times))
            self._rate.add(len(times))
            generated.inc(len(times))
            if (committed_at := self._committed_at.pop(version, None)) is not None:
                self._commit_to_first_token.observe(_since(committed_at))
            for at in times:
                if (before := last_at.get(sample)) is None:
                    self._first_token.observe(at - arrived)
                    first_token.observe(at - arrived)
                else:
                    self._inter_token.observe(at - before)
                    inter_token.observe(at - before)
                last_at[sample] = at

        return record

    def cached(self, cached_prompt_tokens: int) -> None:
        """Counts the tokens of a prompt that came from the prefix cache."""
        self._cached.inc(cached_prompt_tokens)

    def called(self, method: str, code: grpc.StatusCode, reason: str | None) -> None:
        """Counts a finished call; `reason` is the finish reason of Generate, None after an error."""
        self._calls.labels(method, code.name.lower()).inc()
        if method == "Generate":
            self.ended(reason or code.name)

    def client_refused(self, client: str, limit: str) -> None:
        """Counts a call that a limit of its client refused: `streams` or `tokens`."""
        self._client_refusals.labels(client, limit).inc()

    def client_used(self, client: str, tokens: int) -> None:
        """Counts tokens of prompts, and generated ones, of a client."""
        self._client_tokens.labels(client).inc(tokens)

    def certificate(self, ends_at: Callable[[], float]) -> None:
        """Shows when the certificate of the server ends."""
        gauge = Gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "When the certificate of the server ends.",
            namespace=_NAMESPACE,
            registry=self._collectors,
        )
        gauge.set_function(ends_at)

    def answered_over_http(self, status: int) -> None:
        """Counts a request over HTTP by the status of its answer."""
        self._http.labels(status).inc()

    def ended(self, reason: str) -> None:
        """Counts a request for text that has ended, over gRPC or HTTP, by its finish reason or status code."""
        self._requests.labels(reason.lower()).inc()

    def health(self, healthy: bool) -> None:
        """Shows the health of the server."""
        self._healthy.set(healthy)

    def answered(self, version: int, reason: str) -> None:
        """Counts a finished Generate call of a version by its reason or status code."""
        self._version_requests.labels(version, reason.lower()).inc()

    def streams(self, version: int, streams: int) -> None:
        """Sets the number of requests that a version is answering."""
        self._version_streams.labels(version).set(streams)

    def serves(self, manifest: VersionManifest, seconds: float, *, swap: bool, first: bool) -> None:
        """Records that a version serves, `seconds` after it was chosen: as a swap or not, for the first time or not."""
        if swap:
            self._swaps.inc()
            self._swap_seconds.observe(seconds)
        if first and manifest.created_at > self._since:
            self._commit_to_serving.observe(_since(manifest.created_at))
            self._committed_at[manifest.version] = manifest.created_at

    def refused(self, reason: str) -> None:
        """Counts a refused version."""
        self._refused.labels(reason).inc()

    def evaluated(self, figures: Mapping[int, Figures]) -> None:
        """Replaces the figures of the evaluations, by version."""
        self._models.rate(figures)

    def resident(self, versions: Sequence[Resident], serving: int | None) -> None:
        """Replaces the versions in memory; the series of all others are removed."""
        before = {each.manifest.version for each in self._models.versions}
        self._models.show(tuple(versions), serving)
        by_version = (
            self._version_streams,
            self._version_tokens,
            self._version_first_token,
            self._version_inter_token,
        )
        after = {each.manifest.version for each in versions}
        for number in after:
            # A series starts at 0 instead of being absent.
            for metric in by_version:
                metric.labels(number)
            for reason in _ENDS:
                self._version_requests.labels(number, reason)
        for number in before - after:
            self._committed_at.pop(number, None)
            for metric in (*by_version, self._version_requests):
                metric.remove_by_labels({"version": str(number)})


def _since(moment: float) -> float:
    """Returns the time since a version was committed: by another process, so only the wall clock applies, which may be
    set back."""
    return max(0.0, time.time() - moment)


class _Models(Collector):
    """The versions in memory, replaced at once, so that no page shows two serving ones; and how the serving one was
    evaluated."""

    def __init__(self) -> None:
        self._shown: tuple[tuple[Resident, ...], int | None] = ((), None)
        self._figures: Mapping[int, Figures] = {}

    @property
    def versions(self) -> tuple[Resident, ...]:
        """Returns the versions that the page shows."""
        return self._shown[0]

    def show(self, versions: tuple[Resident, ...], serving: int | None) -> None:
        """Replaces what the page shows."""
        self._shown = (versions, serving)

    def rate(self, figures: Mapping[int, Figures]) -> None:
        """Replaces the figures of the evaluations."""
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Yields one sample for each version, and the figures of the serving one if it was evaluated."""
        versions, serving = self._shown
        figures = None if serving is None else self._figures.get(serving)
        for name, what in (
            ("bits_per_byte", "Bits per byte of the serving version on a whole held-out text."),
            ("perplexity", "Perplexity per token of the serving version on a whole held-out text."),
        ):
            figure = GaugeMetricFamily(f"{_NAMESPACE}_evaluated_{name}", what, labels=["version", "method"])
            if figures is not None:
                figure.add_metric([str(serving), figures.method_digest[:_DIGITS]], getattr(figures, name))
            yield figure
        family = GaugeMetricFamily(
            f"{_NAMESPACE}_model_info",
            "1 for each version in memory; serving is true for the one that answers new requests.",
            labels=["version", "run", "step", "preset", "tokenizer", "parameters", "weights", "serving"],
        )
        for each in versions:
            one = each.manifest
            numbers = (one.version, one.run, one.step, one.preset, one.tokenizer, one.parameters, each.weights)
            # Text in a manifest may hold characters that UTF-8 cannot encode.
            values = [str(number).encode(errors="backslashreplace").decode() for number in numbers]
            family.add_metric([*values, str(one.version == serving).lower()], 1)
        yield family


class TokenRate:
    """Tokens per second over a sliding window, counted in tenths of a second; 0 when idle."""

    _TICK_S = 0.1

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # (tick, tokens); the event loop writes it and the page's threads read it: copying a deque is atomic.
        self._counts: deque[tuple[int, int]] = deque(maxlen=round(_RATE_WINDOW_S / self._TICK_S) + 1)

    def add(self, tokens: int) -> None:
        """Counts tokens now."""
        tick = int(self._clock() / self._TICK_S)
        count = self._counts.pop()[1] if self._counts and self._counts[-1][0] == tick else 0
        self._counts.append((tick, count + tokens))

    def read(self) -> float:
        """Returns the rate over the window that ends now."""
        oldest = (self._clock() - _RATE_WINDOW_S) / self._TICK_S
        return sum(count for tick, count in self._counts.copy() if tick > oldest) / _RATE_WINDOW_S
