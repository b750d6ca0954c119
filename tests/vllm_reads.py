"""What vLLM makes of command lines. Tests run it in an environment of vLLM, so it imports nothing of this project.

stdin: a list of command lines without the word vllm. stdout, last line: for each the parallelism and limits of the
engine's configuration, or the error; and the names of all tool-call parsers, the code of parsers and metrics.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser


def configured(command: list[str]) -> dict[str, Any]:
    """The arguments as vLLM understands them, and the engine's configuration or the error of making it."""
    parser = FlexibleArgumentParser()
    serve = ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args(command)
    serve.validate(arguments)
    arguments.model = arguments.model_tag
    found: dict[str, Any] = {
        "tools": arguments.tool_call_parser if arguments.enable_auto_tool_choice else None,
        "name": arguments.served_model_name,
        "headless": arguments.headless,
    }
    try:
        engine = AsyncEngineArgs.from_cli_args(arguments)
        config = engine.create_engine_config(headless=arguments.headless)
    except Exception as error:  # the caller judges it
        return found | {"error": f"{type(error).__name__}: {error}"}
    parallel = config.parallel_config
    return found | {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "copies": parallel.data_parallel_size,
        "local": parallel.data_parallel_size_local,
        "nodes": parallel.nnodes,
        "rank": parallel.node_rank,
        "context": config.model_config.max_model_len,
        "sequences": config.scheduler_config.max_num_seqs,
        "cache": config.cache_config.kv_cache_memory_bytes,
        "drain": config.shutdown_timeout,
    }


def text(*folders: str) -> str:
    """All code of some of vLLM's folders."""
    root = Path(vllm.__file__).parent
    return "\n".join(p.read_text(encoding="utf-8") for folder in folders for p in sorted((root / folder).rglob("*.py")))


if __name__ == "__main__":
    result = {
        "configured": [configured(command) for command in json.load(sys.stdin)],
        "parsers": sorted(ToolParserManager.list_registered()),
        "parsing": text("tool_parsers", "parser", "entrypoints/openai"),
        "metrics": text("v1/metrics"),
    }
    print()
    print(json.dumps(result))
