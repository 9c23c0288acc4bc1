"""Figures for Prometheus, in a registry of their own; names begin with flashmoe_."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flashmoe.api import LLM
from flashmoe.stats import GenerationStats
from storage import host

# Seconds. A prompt of thousands of tokens from a cold drive takes minutes; a token from VRAM a millisecond.
_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts what happens; for any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flashmoe_{name}", text, labels, registry=self._registry)

        self._prompt = counter("prompt_tokens", "Tokens of prompts, those found in the KV cache included")
        self._cached = counter("cached_prompt_tokens", "Tokens of prompts found in the KV cache")
        self._generated = counter("generated_tokens", "Tokens generated")
        self._requests = counter("generations", "Generations by how they ended", "outcome")
        self._refused = counter("refused_requests", "Requests answered with an error", "status")
        self._first = Histogram(
            "flashmoe_time_to_first_token_seconds", "From a request to its first token, queue included",
            buckets=_FIRST, registry=self._registry,
        )  # fmt: skip
        self._between = Histogram(
            "flashmoe_inter_token_seconds", "Between a generation's tokens", buckets=_BETWEEN,
            registry=self._registry,
        )  # fmt: skip

    def watch(self, llm: LLM) -> None:
        """Add the figures of the scheduler, the expert cache and the process."""
        self._registry.register(_LlmCollector(llm))

    def token(self, seconds: float, first: bool) -> None:
        """A token came, so long after the one before or, if it is the first, after the request."""
        (self._first if first else self._between).observe(seconds)
        self._generated.inc()

    def finished(self, stats: GenerationStats, outcome: str) -> None:
        """A generation ended."""
        self._requests.labels(outcome).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.cached_tokens)

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class _LlmCollector(Collector):
    """Read when asked for."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        scheduler, cache = self._llm.scheduler, self._llm.expert_cache
        counters = cache.counters
        for name, text, gauge in (
            ("running_requests", "Generations that are computed", scheduler.running),
            ("waiting_requests", "Generations in the queue", scheduler.waiting),
            ("queue_limit", "Generations that may wait", scheduler.most_waiting),
            ("resident_experts", "Experts in memory", self._resident()),
            ("ram_budget_bytes", "RAM for the whole process", self._llm.plan.budget_bytes),
            ("rss_bytes", "Resident memory of the process", host.rss_bytes()),
        ):
            yield GaugeMetricFamily(f"flashmoe_{name}", text, gauge)
        for name, text, total in (
            ("expert_hits", "Experts found in memory", counters.hits),
            ("expert_misses", "Experts that had to be read", counters.misses),
            ("expert_read_bytes", "Bytes of experts read", counters.bytes_read),
            ("expert_stall_seconds", "Time that computing waited for reads", counters.stall_s),
        ):
            yield CounterMetricFamily(f"flashmoe_{name}", text, total)

    def _resident(self) -> int:
        """Who is resident may change while it is looked at: then look again."""
        for _ in range(3):
            try:
                return len(self._llm.expert_cache.resident)
            except RuntimeError:
                continue
        return 0
