"""Run vLLM's serving benchmark once for each line on standard input. It runs in vLLM's environment, not in ours.

python driver.py TOKENIZER

A line is a JSON object of Ask; the answer is a line with a JSON object: the benchmark's result with its records of each
request, and `cpu_seconds`, or `error`. One process serves all runs, because the imports take longer than a run.
"""

import asyncio
import copy
import json
import os
import re
import resource
import sys
from typing import Any


def main() -> None:
    """Answer the lines until standard input ends. What the benchmark prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import aiohttp
    from vllm.benchmarks.lib.endpoint_request_func import StreamedResponseHandler
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _connect_for_each_request(aiohttp)
    _tell_usage_apart(StreamedResponseHandler)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    settled = parser.parse_args(
        [
            *("--backend", "openai", "--endpoint", "/v1/completions", "--tokenizer", sys.argv[1]),
            *("--dataset-name", "random", "--temperature", "0", "--disable-tqdm", "--save-detailed"),
        ]
    )
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        ask = json.loads(line)
        arguments = copy.deepcopy(settled)  # the benchmark changes them
        arguments.base_url, arguments.model = ask["url"], ask["model"]
        arguments.random_input_len, arguments.random_output_len = ask["prompt_tokens"], ask["new_tokens"]
        arguments.num_prompts, arguments.max_concurrency = ask["requests"], ask["concurrency"]
        arguments.seed = ask["seed"]
        before = _cpu_seconds()
        try:
            result = asyncio.run(main_async(arguments))
            _reply(replies, {**result, "cpu_seconds": _cpu_seconds() - before})
        except Exception as error:  # for the caller, who knows what it means
            _reply(replies, {"error": f"{type(error).__name__}: {error}"})


def _connect_for_each_request(aiohttp: Any) -> None:
    """Let the benchmark reuse no connection: llama.cpp closes its own after an answer without telling, and a request
    that is sent at that moment would count as failed. On one machine, to connect takes a fraction of a millisecond."""
    whole = aiohttp.TCPConnector

    def connector(**named: Any) -> Any:
        return whole(
            **{key: value for key, value in named.items() if key != "keepalive_timeout"} | {"force_close": True}
        )

    aiohttp.TCPConnector = connector


def _tell_usage_apart(handler: Any) -> None:
    """Let the benchmark's reader of streams see the usage that llama.cpp tells beside its last choice: it looks for it
    only in a message without one, and counts the tokens of the text again otherwise, which finds other numbers."""
    whole = handler.add_chunk

    def add_chunk(self: Any, chunk: bytes) -> list[str]:
        return [part for message in whole(self, chunk) for part in usage_apart(message)]

    handler.add_chunk = add_chunk


def usage_apart(message: str) -> list[str]:
    """An event of a stream; in two, if it tells the usage beside a choice. A choice without a text is no token."""
    if not re.search(r'"usage": ?\{', message):
        return [message]
    values = json.loads(message.removeprefix("data: "))
    if not values.get("choices"):
        return [message]
    usage = "data: " + json.dumps({**values, "choices": []})
    return ["data: " + json.dumps({**values, "usage": None}), usage] if values["choices"][0].get("text") else [usage]


def _reply(replies: Any, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer, default=float) + "\n")
    replies.flush()


def _cpu_seconds() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    main()
