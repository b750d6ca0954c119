"""The environment variables of every computing process, for bit-identical results and offline operation."""

from __future__ import annotations

import os

# no telemetry from any stage, unless the user has set otherwise
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",  # during import; tasks/quantizers/libraries/llm_compressor.py sets it later
    # without it, the last bits of products with few rows and long sums depend on the number of threads
    "MKL_CBWR": "AUTO,STRICT",
}


def set_environment() -> None:
    """Set the variables of `ENVIRONMENT` for this process and its children, unless the user has set them.

    Call it before the first matrix product: MKL reads its variable once.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
