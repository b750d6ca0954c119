"""A load generator that speaks the protocol of tasks/loadtest/driver.py without vLLM, for tests.

python load_driver.py TOKENIZER
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httpx


async def one(client: httpx.AsyncClient, ask: dict[str, Any], turn: asyncio.Semaphore, number: int) -> dict[str, Any]:
    """Send a request, and record it as vLLM's benchmark does."""
    body = {
        "model": ask["model"],
        "prompt": f"prompt {ask['seed']}-{number}",
        "max_tokens": ask["new_tokens"],
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record = {"ttft": 0.0, "itl": [], "latency": 0.0, "input": ask["prompt_tokens"], "output": 0, "error": ""}
    async with turn:
        started = last = time.perf_counter()
        try:
            async with client.stream("POST", ask["url"] + "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    part = json.loads(line.removeprefix("data: "))
                    now = time.perf_counter()
                    if part["choices"]:
                        if record["ttft"]:
                            record["itl"].append(now - last)
                        else:
                            record["ttft"] = now - started
                        last = now
                    else:
                        record["output"] = part["usage"]["completion_tokens"]
            record["latency"] = last - started
        except httpx.HTTPError as error:
            record["error"] = f"Traceback\n  ...\n{type(error).__name__}: {error}"
    return record


async def run(ask: dict[str, Any]) -> dict[str, Any]:
    """All requests of a line, in the form of vLLM's result."""
    turn = asyncio.Semaphore(ask["concurrency"])
    before = time.process_time()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        started = time.perf_counter()
        records = await asyncio.gather(*(one(client, ask, turn, number) for number in range(ask["requests"])))
        duration = time.perf_counter() - started
    names = {"ttfts": "ttft", "itls": "itl", "latencies": "latency", "input_lens": "input", "output_lens": "output"}
    lists = {name: [record[key] for record in records] for name, key in (names | {"errors": "error"}).items()}
    return {**lists, "duration": duration, "cpu_seconds": time.process_time() - before}


def main() -> None:
    """Answer the lines until standard input ends."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
