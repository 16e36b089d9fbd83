"""The metrics of the inference service, all of them."""

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from shared.accelerator import Memory
from shared.registry.manifest import VersionManifest

# Half a millisecond apart where a decode step takes a few, wider above.
_STEP_BUCKETS = (
    *(0.0005 * count for count in range(1, 21)),
    *(0.0125, 0.015, 0.0175, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
_FIRST_TOKEN_BUCKETS = (*_STEP_BUCKETS, 5.0, 10.0, 30.0)
# The span over which tokens per second are counted.
_RATE_WINDOW_S = 3.0


class InferenceMetrics:
    """Counts what the service does, in a collector registry that is passed in. Not thread-safe but for the page."""

    def __init__(self, registry: CollectorRegistry, memory: Callable[[], Memory]) -> None:
        def name(suffix: str) -> str:
            return f"gptloop_inference_{suffix}"

        self._rate = TokenRate()
        self._infos: set[tuple[str, ...]] = set()
        self._generated = Counter(name("generated_tokens_total"), "Tokens that were generated.", registry=registry)
        self._prompt = Counter(name("prompt_tokens_total"), "Prompt tokens of accepted requests.", registry=registry)
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
        self.active_streams = Gauge(name("active_streams"), "Streams that have a slot.", registry=registry)
        self.waiting_requests = Gauge(name("waiting_requests"), "Requests that wait for a slot.", registry=registry)
        memory_bytes = Gauge(
            name("memory_bytes"),
            "Memory: active and cached by MLX, its peak, and resident in this process.",
            ["kind"],
            registry=registry,
        )
        for kind in ("active", "cache", "peak", "resident"):
            memory_bytes.labels(kind).set_function(lambda kind=kind: getattr(memory(), f"{kind}_bytes"))  # type: ignore[misc]
        self._model_info = Gauge(
            name("model_info"),
            "1 for each version in memory; serving is true for the one that answers new requests.",
            ["version", "run", "step", "preset", "tokenizer", "parameters", "serving"],
            registry=registry,
        )
        self.swaps = Counter(
            name("swaps_total"), "Times that another version took over as the serving one.", registry=registry
        )
        self._refused = Counter(
            name("refused_versions_total"), "Versions that were refused, by why.", ["reason"], registry=registry
        )
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def accepted(self, prompt_tokens: int) -> None:
        """A request was encoded and handed to the engine."""
        self._prompt.inc(prompt_tokens)

    def token(self, arrived: float, last_at: float | None, at: float) -> None:
        """A token was generated `at` a time; the one before it in its stream `last_at`, if there was one."""
        self._generated.inc()
        self._rate.add()
        if last_at is None:
            self._first_token.observe(at - arrived)
        else:
            self._inter_token.observe(at - last_at)

    def ended(self, reason: str) -> None:
        """A Generate call ended: a finish reason, or the status code of its error."""
        self._requests.labels(reason.lower()).inc()

    def refused(self, reason: str) -> None:
        """A version was found unfit to serve."""
        self._refused.labels(reason).inc()

    def resident(self, versions: list[VersionManifest], serving: int | None) -> None:
        """Says which versions are in memory, all others being gone."""
        infos: set[tuple[str, ...]] = {
            (
                str(manifest.version),
                manifest.run,
                str(manifest.step),
                manifest.preset,
                manifest.tokenizer,
                str(manifest.parameters),
                str(manifest.version == serving).lower(),
            )
            for manifest in versions
        }
        for info in infos:
            self._model_info.labels(*info).set(1)
        for info in self._infos - infos:
            self._model_info.remove(*info)
        self._infos = infos


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
