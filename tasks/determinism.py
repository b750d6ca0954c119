"""The environment of every process that computes: what decides a result's last bits, and what keeps it offline."""

from __future__ import annotations

import os

# offline and silent unless a person said otherwise: no stage calls home
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",  # while it is imported; tasks/quantizers/compressor.py chooses after that
    # or the last bits of a product of few rows and a long sum depend on the number of threads
    "MKL_CBWR": "AUTO,STRICT",
}


def set_environment() -> None:
    """What every stage's process, and those that it starts, find in their environment, unless a person set it.

    To be called before the first product: MKL reads its variable once.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
