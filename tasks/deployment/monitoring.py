"""Alerts for Prometheus and a dashboard for Grafana, on the servers' own metrics."""

from __future__ import annotations

from typing import Any

Rule = tuple[str, str, str, str, str]  # name, expression, duration, severity, summary
_QUANTILES = (0.5, 0.95)
_ONNX = "onnx_server"
VLLM_REQUESTS = "vllm:num_requests_running", "vllm:num_requests_waiting"
ONNX_REQUESTS = f"{_ONNX}_requests_running", f"{_ONNX}_requests_waiting"


def alert_rules(name: str, engines: int, start: int) -> dict[str, Any]:
    """A file of alert rules for vLLM. The limits are starting values, to be set to what users expect. engines: that are
    described. start: seconds that a start may take."""
    mine = f'model_name="{name}"'
    failed = f'vllm:request_success_total{{{mine}, finished_reason="error"}}'
    cache = (
        "CacheFull",
        f"max(vllm:kv_cache_usage_perc{{{mine}}}) > 0.95",
        "10m",
        "warning",
        "The KV cache is nearly full: requests wait or start again. Lower max-num-seqs or add a server.",
    )
    late = _late(f"vllm:time_to_first_token_seconds_bucket{{{mine}}}", 5)
    # a counter is there from the start; a gauge only after the engine's first request, if vLLM has several processes
    lost = _lost(f"vllm:generation_tokens_total{{{mine}}}", engines, start)
    running, waiting = (f"{metric}{{{mine}}}" for metric in VLLM_REQUESTS)
    return _rules_file(name, [*_requests(running, failed, waiting), *lost, cache, late])


def onnx_alert_rules(name: str, servers: int, start: int) -> dict[str, Any]:
    """The same for the server of ONNX exports, whose metrics get the label model_name when they are collected."""
    mine = f'model_name="{name}"'
    failed = f'{_ONNX}_responses_total{{{mine}, status="500"}}'
    late = _late(f"{_ONNX}_time_to_first_token_seconds_bucket{{{mine}}}", 30)
    running, waiting = (f"{metric}{{{mine}}}" for metric in ONNX_REQUESTS)
    return _rules_file(name, [*_requests(running, failed, waiting), *_lost(running, servers, start), late])


def _requests(running: str, failed: str, waiting: str) -> list[Rule]:
    """What every server is watched for. running, failed, waiting: metrics."""
    return [
        ("Down", f"absent({running})", "5m", "critical", "No server reports metrics."),
        ("RequestsFail", f"sum(rate({failed}[5m])) > 0", "5m", "critical", "Requests end with an error of the server."),
        (
            "RequestsWait",
            f"sum({waiting}) > 10",
            "10m",
            "warning",
            "More than 10 requests have been waiting for 10 minutes: add a server.",
        ),
    ]


def _lost(metric: str, engines: int, start: int) -> list[Rule]:
    """metric: one series of each engine."""
    words = f"Fewer than {engines} copies of the model report metrics."
    return [("CopiesLost", f"count({metric}) < {engines}", f"{start}s", "warning", words)] if engines > 1 else []


def _late(bucket: str, seconds: int) -> Rule:
    """bucket: of the histogram of times to the first token."""
    slow = f"histogram_quantile(0.95, sum by (le) (rate({bucket}[5m])))"
    words = f"One request in 20 waits over {seconds} s for its first token."
    return "FirstTokenLate", f"{slow} > {seconds}", "10m", "warning", words


def _rules_file(name: str, rules: list[Rule]) -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": name,
                "rules": [
                    {
                        "alert": f"Model{alert}",
                        "expr": expression,
                        "for": duration,
                        "labels": {"severity": severity, "model": name},
                        "annotations": {"summary": summary},
                    }
                    for alert, expression, duration, severity, summary in rules
                ],
            }
        ]
    }


def dashboard(name: str) -> dict[str, Any]:
    """A dashboard for Grafana, which asks for the data source."""
    mine = f'model_name="{name}"'
    panels = [
        (
            "Requests",
            "short",
            dict(zip(("running", "waiting"), (f"{one}{{{mine}}}" for one in VLLM_REQUESTS), strict=True)),
        ),
        ("KV cache in use", "percentunit", {"{{pod}}": f"vllm:kv_cache_usage_perc{{{mine}}}"}),
        ("Time to the first token", "s", _quantiles("vllm:time_to_first_token_seconds", mine)),
        ("Time between tokens", "s", _quantiles("vllm:inter_token_latency_seconds", mine)),
        ("Time of a request", "s", _quantiles("vllm:e2e_request_latency_seconds", mine)),
        (
            "Tokens per second",
            "short",
            {
                kind: f"sum(rate(vllm:{kind}_tokens_total{{{mine}}}[$__rate_interval]))"
                for kind in ("prompt", "generation")
            },
        ),
        (
            "Requests per second by end",
            "reqps",
            {
                "{{finished_reason}}": "sum by (finished_reason) "
                f"(rate(vllm:request_success_total{{{mine}}}[$__rate_interval]))"
            },
        ),
        (
            "Preemptions per second",
            "short",
            {"{{pod}}": f"rate(vllm:num_preemptions_total{{{mine}}}[$__rate_interval])"},
        ),
    ]
    return {
        "title": name,
        "uid": name,
        "editable": True,
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [_panel(number, *panel) for number, panel in enumerate(panels)],
    }


def _quantiles(metric: str, mine: str) -> dict[str, str]:
    rate = f"sum by (le) (rate({metric}_bucket{{{mine}}}[$__rate_interval]))"
    return {f"{100 * q:g}%": f"histogram_quantile({q}, {rate})" for q in _QUANTILES}


def _panel(number: int, title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": source,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(queries.items())
        ],
    }
