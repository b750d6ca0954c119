"""What the load generator recorded: one request, and one run of many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A request that was answered in full.

    first_token_seconds: from sending it to the first token. gaps_seconds: between the parts of the streamed answer that
    follow. latency_seconds: from sending it to the last token. prompt_tokens and new_tokens: as the server counts them.
    """

    first_token_seconds: float
    gaps_seconds: tuple[float, ...]
    latency_seconds: float
    prompt_tokens: int
    new_tokens: int

    @property
    def time_per_token_seconds(self) -> float:
        """Mean seconds for each token after the first (TPOT)."""
        return (self.latency_seconds - self.first_token_seconds) / max(1, self.new_tokens - 1)


@dataclass(frozen=True)
class Run:
    """Requests to one server, at most `concurrency` at a time.

    requests: those answered in full. failures: a line for each of the others. duration_seconds: from the first request
    to the last answer, failed ones included. generator_cpu_seconds and server_cpu_seconds: processor time of each.
    """

    concurrency: int
    duration_seconds: float
    requests: tuple[Request, ...]
    failures: tuple[str, ...]
    generator_cpu_seconds: float
    server_cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of all requests together."""
        return sum(request.new_tokens for request in self.requests) / self.duration_seconds
