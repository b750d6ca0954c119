"""What a target shares with another, and whether it has a server."""

from __future__ import annotations

from tasks.settings import TARGETS

_FILES = {target: "transformers" if target == "vllm" else target for target in TARGETS}


def files_of(target: str) -> str | None:
    """The target whose exporter and runtime `target` uses: vLLM reads the files of Transformers. None if unknown."""
    return _FILES.get(target)


def has_server(target: str) -> bool:
    """Whether a target's models are served; Transformers is a library."""
    return target != "transformers"
