"""The command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import StartError

KEY_VARIABLE = "ONNX_SERVER_API_KEY"
KIB, GIB = 2**10, 2**30


@dataclass(frozen=True)
class Options:
    """Settings of the server. Sizes in bytes, times in seconds.

    max_model_len: tokens of prompt and answer together; None: the model's own. kv_cache: memory for the KV cache of one
    batch. drain: time for the running requests when the server is told to end. keys: accepted API keys; empty: none is
    asked for.
    """

    model: Path
    name: str
    threads: int
    host: str = "127.0.0.1"
    port: int = 8000
    max_model_len: int | None = None
    max_batch: int = 16
    max_queue: int = 64
    max_body: int = 4096 * KIB
    kv_cache: int = 4 * GIB
    drain: float = 30.0
    keys: tuple[str, ...] = ()


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line. StartError if the folder or the key file cannot be read."""
    parser = argparse.ArgumentParser(
        prog="onnx_server", description="Serve an ONNX Runtime GenAI model over an OpenAI-compatible HTTP interface."
    )
    parser.add_argument("model", type=Path, help="folder with genai_config.json, model.onnx and tokenizer.json")
    parser.add_argument("--host", default=Options.host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_count, default=Options.port, help="(default: %(default)s)")
    parser.add_argument("--served-model-name", metavar="NAME", help="name for clients (default: the folder's)")
    parser.add_argument(
        "--max-model-len", type=_count, metavar="TOKENS", help="of prompt and answer together (default: the model's)"
    )
    parser.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="for the computation (default: OMP_NUM_THREADS, or else one for each usable core)",
    )
    parser.add_argument(
        "--max-batch", type=_count, default=Options.max_batch, metavar="N", help="texts computed together (%(default)s)"
    )
    parser.add_argument(
        "--max-queue",
        type=_count,
        default=Options.max_queue,
        metavar="N",
        help="requests that may wait; more are answered with 503 (%(default)s)",
    )
    parser.add_argument(
        "--max-body-kib", type=_count, default=Options.max_body // KIB, metavar="KIB", help="of a request (%(default)s)"
    )
    parser.add_argument(
        "--kv-cache-gib", type=float, default=Options.kv_cache / GIB, metavar="GIB", help="of one batch (%(default)s)"
    )
    parser.add_argument(
        "--drain-seconds", type=float, default=Options.drain, metavar="S", help="for running requests at the end"
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"accepted API keys, one a line (or one key in the variable {KEY_VARIABLE}); default: none is asked for",
    )
    given = parser.parse_args(arguments)
    return Options(
        model=given.model,
        name=given.served_model_name or given.model.resolve().name,
        host=given.host,
        port=given.port,
        max_model_len=given.max_model_len,
        threads=given.threads or _threads(),
        max_batch=given.max_batch,
        max_queue=given.max_queue,
        max_body=given.max_body_kib * KIB,
        kv_cache=int(given.kv_cache_gib * GIB),
        drain=given.drain_seconds,
        keys=_keys(given.api_key_file),
    )


def _threads() -> int:
    """OMP_NUM_THREADS, or else one for each usable core."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named):
        return int(named)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _keys(file: Path | None) -> tuple[str, ...]:
    """The accepted keys. An empty file or variable would leave the server open, so it is refused."""
    if file is None:
        if KEY_VARIABLE not in os.environ:
            return ()
        keys, where = [os.environ[KEY_VARIABLE].strip()], f"the variable {KEY_VARIABLE}"
    else:
        where = str(file)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"cannot read the API keys in {file}: {error}; name a readable text file") from error
        keys = [line.strip() for line in lines if not line.startswith("#")]
    keys = [key for key in keys if key]
    if not keys:
        raise StartError(f"{where} holds no API key; write one into it, or leave it out to serve without keys")
    if any(not key.isascii() for key in keys):
        raise StartError(f"{where} holds a key with other characters than ASCII; write another one")
    return tuple(keys)
