"""What /metrics says, in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from volvelle.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Figures:
    """Counters and histograms of one server, and what its engine says of itself when asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "volvelle_requests", "Requests by path and status.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "volvelle_request_seconds", "From request to the end of its answer.", ("path",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "volvelle_time_to_first_token_seconds", "From request to its first token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip

    def watch(self, engine: Engine) -> None:
        """Report an engine's load too."""
        self.registry.register(_OfEngine(engine))

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        load, seats = self.engine.load, self.engine.seats.count
        for name, help, value in (
            ("volvelle_texts_waiting", "Texts in the queue.", load.waiting),
            ("volvelle_texts_running", "Texts that are being written.", load.running),
            ("volvelle_seats", "Texts that can be written side by side.", seats),
        ):
            yield GaugeMetricFamily(name, help, value)
        for name, help, value in (
            ("volvelle_prompt_tokens", "Tokens of prompts that were read.", load.prompt_tokens),
            ("volvelle_tokens", "Tokens that were written.", load.tokens),
            ("volvelle_draft_tokens", "Draft tokens that were checked, of finished texts.", load.drafted),
            ("volvelle_accepted_tokens", "Draft tokens that were kept, of finished texts.", load.accepted),
        ):
            yield CounterMetricFamily(name, help, value)
