"""Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
PREFIX = "onnx_server"


class Metrics:
    """The metrics of one server, in a registry of its own. engine: id of the process that computes."""

    def __init__(self, engine: int) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        ProcessCollector(namespace="engine", pid=lambda: engine, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, registry=registry, buckets=buckets)

        self.responses = Counter(f"{PREFIX}_responses", "Answered HTTP requests", ["path", "status"], registry=registry)
        self.waiting = Gauge(f"{PREFIX}_requests_waiting", "Requests in the queue", registry=registry)
        self.running = Gauge(f"{PREFIX}_requests_running", "Requests that are being generated", registry=registry)
        self.prompt_tokens = Counter(f"{PREFIX}_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generation_tokens = Counter(f"{PREFIX}_generation_tokens", "Generated tokens", registry=registry)
        self.finished = Counter(
            f"{PREFIX}_texts", "Generated texts by what ended them", ["finish_reason"], registry=registry
        )
        self.batch_rows = histogram("batch_rows", "Texts generated together", (1, 2, 4, 8, 16, 32, 64))
        self.queue_seconds = histogram("queue_seconds", "From arrival to the start of its batch", _SECONDS)
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self.between_tokens = histogram("time_between_tokens_seconds", "From a token to the next", _TOKENS)
        self.request_seconds = histogram("request_seconds", "From arrival to the last token", _SECONDS)
