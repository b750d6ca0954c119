"""What the stages of a run need: the file that `python -m tasks.planning` writes and the flow reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.errors import TaskError


@dataclass(frozen=True)
class Need:
    """The need of one stage.

    seconds: None if unknown; `note` gives the reason. memory: peak of its process, bytes; with a GPU, of the GPU. disk:
    bytes that it leaves. scratch: further bytes on disk while it runs. rough: extrapolated.
    """

    seconds: float | None
    memory: float
    disk: float = 0.0
    scratch: float = 0.0
    note: str | None = None
    rough: bool = False


@dataclass(frozen=True)
class Measurement:
    """The needs of a run's stages on one machine.

    key: hash of the model and the settings. memory, disk: bytes of the computing device and free on disk. took, held:
    seconds and peak bytes of the measurement itself.
    """

    key: str
    machine: str
    device: str
    cores: int
    memory: float
    disk: float
    when: str
    model: str
    parameters: int
    took: float
    held: float
    needs: Mapping[str, Need]


def read_measurement(path: Path) -> Measurement:
    """Read a file of `modelpress plan`, made here or on another machine; TaskError if it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Measurement(**values | {"needs": {stage: Need(**need) for stage, need in values["needs"].items()}})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TaskError(
            f"{path} is not a measurement ({' '.join(str(error).split())}); `modelpress plan --model CONFIG` on that "
            "machine writes one and prints its path"
        ) from error


def carried(there: Measurement, sizes: Measurement) -> Measurement:
    """Apply the times of another machine to the run that `sizes` describes. For a different model or other settings,
    scale them by the number of parameters and mark them as rough."""
    needs = dict(sizes.needs)
    for stage, need in needs.items():
        known = there.needs.get(stage, Need(None, 0.0, note="not measured there"))
        seconds = known.seconds and known.seconds * sizes.parameters / there.parameters
        needs[stage] = replace(need, seconds=seconds, note=known.note, rough=known.rough or there.key != sizes.key)
    return replace(there, key=sizes.key, model=sizes.model, parameters=sizes.parameters, needs=needs)
