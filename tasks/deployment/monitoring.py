"""Alerts for Prometheus and a dashboard for Grafana, on the servers' own metrics."""

from __future__ import annotations

from typing import Any

_QUANTILES = (0.5, 0.95)
_ONNX = "onnx_server"
VLLM_WAITING, ONNX_WAITING = "vllm:num_requests_waiting", f"{_ONNX}_requests_waiting"


def alert_rules(name: str) -> dict[str, Any]:
    """A file of alert rules for vLLM. The limits are starting values, to be set to what users expect."""
    mine = f'model_name="{name}"'
    slow = f"histogram_quantile(0.95, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket{{{mine}}}[5m])))"
    failed = f'sum(rate(vllm:request_success_total{{{mine}, finished_reason="error"}}[5m]))'
    rules = [
        ("Down", f"absent(vllm:num_requests_running{{{mine}}})", "5m", "critical", "No server reports metrics."),
        ("RequestsFail", f"{failed} > 0", "5m", "critical", "Requests end with an error of the server."),
        (
            "RequestsWait",
            f"sum(vllm:num_requests_waiting{{{mine}}}) > 10",
            "10m",
            "warning",
            "More than 10 requests have been waiting for 10 minutes: add a server.",
        ),
        (
            "CacheFull",
            f"max(vllm:kv_cache_usage_perc{{{mine}}}) > 0.95",
            "10m",
            "warning",
            "The KV cache is nearly full: requests wait or start again. Lower max-num-seqs or add a server.",
        ),
        ("FirstTokenLate", f"{slow} > 5", "10m", "warning", "One request in 20 waits over 5 s for its first token."),
    ]
    return _rules_file(name, rules)


def onnx_alert_rules(name: str) -> dict[str, Any]:
    """The same for the server of ONNX exports, whose metrics get the label model_name when they are collected."""
    mine = f'model_name="{name}"'
    slow = f"histogram_quantile(0.95, sum by (le) (rate({_ONNX}_time_to_first_token_seconds_bucket{{{mine}}}[5m])))"
    failed = f'sum(rate({_ONNX}_responses_total{{{mine}, status="500"}}[5m]))'
    rules = [
        ("Down", f"absent({_ONNX}_requests_running{{{mine}}})", "5m", "critical", "No server reports metrics."),
        ("RequestsFail", f"{failed} > 0", "5m", "critical", "Requests end with an error of the server."),
        (
            "RequestsWait",
            f"sum({ONNX_WAITING}{{{mine}}}) > 10",
            "10m",
            "warning",
            "More than 10 requests have been waiting for 10 minutes: add a server.",
        ),
        ("FirstTokenLate", f"{slow} > 30", "10m", "warning", "One request in 20 waits over 30 s for its first token."),
    ]
    return _rules_file(name, rules)


def _rules_file(name: str, rules: list[tuple[str, str, str, str, str]]) -> dict[str, Any]:
    """A file of alert rules: name, expression, duration, severity and summary of each."""
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
        ("Requests", "short", {"running": f"vllm:num_requests_running{{{mine}}}", "waiting": _waiting(mine)}),
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


def _waiting(mine: str) -> str:
    return f"{VLLM_WAITING}{{{mine}}}"


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
