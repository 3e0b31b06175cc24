"""What Prometheus reads from /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# Of the scheduler's statistics those that go up and down; the others are counted from the start.
GAUGES = ("running", "waiting", "pages_used", "pages_total", "page_tokens")

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """Counters and histograms of the HTTP side, and the scheduler's statistics as of its last step."""

    def __init__(self, statistics: Callable[[], Mapping[str, float]]) -> None:
        disable_created_metrics()  # a second line for each, of when it was made
        self.registry = CollectorRegistry()
        self.registry.register(_Statistics(statistics))  # type: ignore[arg-type]
        self.requests = Counter("r1_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.prompt_tokens = Counter("r1_prompt_tokens", "Tokens of prompts taken", registry=self.registry)
        self.completion_tokens = Counter("r1_completion_tokens", "Tokens of completions", registry=self.registry)
        self.first_token_seconds = Histogram(
            "r1_time_to_first_token_seconds",
            "From a request's submission to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.seconds_per_token = Histogram(
            "r1_time_per_output_token_seconds",
            "Mean of a completion's tokens after the first",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "r1_request_seconds",
            "From a request's first byte to its answer's last",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Statistics:
    def __init__(self, statistics: Callable[[], Mapping[str, float]]) -> None:
        self.statistics = statistics

    def collect(self) -> Iterator[Metric]:
        for name, value in self.statistics().items():
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            yield family(f"r1_scheduler_{name}", f"The scheduler's {name.replace('_', ' ')}", value=value)
