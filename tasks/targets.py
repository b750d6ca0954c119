"""Which target's files and runtime of the pipeline a target uses."""

from __future__ import annotations

from tasks.settings import TARGETS

_FILES = {target: "transformers" if target == "vllm" else target for target in TARGETS}


def files_of(target: str) -> str | None:
    """The target whose exporter and runtime `target` uses: vLLM reads the files of Transformers. None if unknown."""
    return _FILES.get(target)
