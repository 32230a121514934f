"""What /metrics says, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from jlora.serving.answers import Choice

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, engine: Any):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "jlora_requests", "Requests that were answered.", ("route", "status", "model"),
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "jlora_request_seconds", "From a request to the end of its answer.", ("route",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "jlora_time_to_first_token_seconds", "From a request to its first token.", ("model",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._tokens = {
            kind: Counter(f"jlora_{kind}_tokens", text, ("model",), registry=registry)
            for kind, text in (
                ("prompt", "Tokens of prompts."),
                ("cached_prompt", "Tokens of prompts whose keys and values were there already."),
                ("generated", "Tokens of answers."),
            )
        }
        registry.register(_EngineStats(engine))

    def count_tokens(self, model: str, choices: Sequence[Choice]) -> None:
        """Count those of answers that are complete."""
        for choice in choices:
            if choice.usage is not None:
                usage = choice.usage
                for kind, count in (
                    ("prompt", usage.prompt),
                    ("cached_prompt", usage.cached),
                    ("generated", usage.completion),
                ):
                    self._tokens[kind].labels(model).inc(count)

    def text(self) -> bytes:
        """All of it, in Prometheus' text form."""
        return generate_latest(self._registry)


class _EngineStats:
    """The engine's own figures, read when they are asked for."""

    def __init__(self, engine: Any):
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        stats = self._engine.stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"jlora_{name}", text, getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"jlora_{name}", text, getattr(stats, name))

    def describe(self) -> list[Any]:
        return []  # so that registering asks nothing of the engine


#: Attributes of `jlora.serving.engine.Stats`.
GAUGES = {
    "rows": "Rows of the running batch.",
    "running": "Requests that have rows.",
    "entering": "Requests whose prompts are run.",
    "waiting": "Requests that wait.",
    "used_bytes": "Memory that keys and values of running requests may take.",
    "token_bytes": "Memory that they may take at most.",
    "cache_bytes": "Memory of the prefix cache.",
    "cache_budget": "Memory that it may take at most.",
    "cache_entries": "Beginnings of prompts in the prefix cache.",
}
COUNTERS = {
    "steps": "Steps of the batch.",
    "step_seconds": "Seconds that they took.",
    "lookups": "Prompts that the prefix cache was asked about.",
    "hits": "Prompts of which it had a beginning.",
    "cancelled": "Answers that were given up.",
    "failed": "Answers that failed.",
}
