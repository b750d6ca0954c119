"""What a machine can do, as a plan needs it: measured by tasks/planning/measure_machine.py, or given in a YAML file.

name: a server, from its data sheet
source: given
device: cuda
cores: 32
memory_gb: 80            # of the device that computes: of the GPU, if that is it
disk_gb: 2000
product_gflops: 15000
...                      # the other fields of `Machine`; a missing one is named
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import TaskError

Positive = Annotated[float, Field(gt=0)]
# of all cores together; the rates of files and of small operations are of one program
SHARED = ("product", "half", "integer", "factor", "memory", "fresh", "stream")


class Machine(BaseModel):
    """Sizes in 10^9 bytes, bandwidths in 10^9 bytes a second, arithmetic in 10^9 operations a second.

    product, half, integer: large products of float32, bfloat16 and 8-bit integers. factor: Cholesky and inverse.
    memory: read and write again in place; fresh: into large memory that the system has yet to give; stream: reading
    weights for a single token. disk_read, disk_write, hash: of files. network: None: a download's time is not counted.
    call_us: one small operation. layer_us: what a decoder layer costs, however few the tokens. start_s: until a stage's
    process has its libraries; base_gb: what it then holds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str = "given"
    device: Literal["cpu", "cuda"] = "cpu"
    cores: Annotated[int, Field(ge=1)]
    memory_gb: Positive
    disk_gb: Positive
    product_gflops: Positive
    half_gflops: Positive
    integer_gflops: Positive
    factor_gflops: Positive
    memory_gbs: Positive
    fresh_gbs: Positive
    stream_gbs: Positive
    disk_read_gbs: Positive
    disk_write_gbs: Positive
    hash_gbs: Positive
    network_gbs: Positive | None = None
    call_us: Positive
    layer_us: Positive
    start_s: Positive
    base_gb: Annotated[float, Field(ge=0)]

    def share(self, threads: int) -> Machine:
        """What a stage with so many threads has of it while others use the rest; of a GPU, all."""
        if self.device == "cuda" or threads >= self.cores:
            return self
        names = [name for name in type(self).model_fields if name.partition("_")[0] in SHARED and name != "memory_gb"]
        rates = {name: getattr(self, name) * threads / self.cores for name in names}
        return self.model_copy(update={"cores": threads, **rates})


def read_machine(path: Path) -> Machine:
    """The machine that a YAML file describes; TaskError naming each field that is missing or wrong."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{path} is no readable YAML file: {' '.join(str(error).split())}") from error
    return check_machine(values, str(path))


def check_machine(values: Any, where: str) -> Machine:
    """Plain values as a Machine; TaskError naming `where` and each field that is missing or wrong."""
    if not isinstance(values, Mapping):
        raise TaskError(f"{where} holds {type(values).__name__}, expected a mapping of the machine's figures")
    try:
        return Machine.model_validate(dict(values))
    except ValidationError as error:
        found = {".".join(map(str, e["loc"][:1])): e["msg"][0].lower() + e["msg"][1:] for e in error.errors()}
        listed = "; ".join(f"{field}: {message}" for field, message in found.items())
        raise TaskError(f"{where}: {listed}; docs/plan.md has an example") from error


def write_machine(path: Path, machine: Machine) -> None:
    """Keep a machine's figures as `read_machine` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(machine.model_dump(mode="json"), sort_keys=False)
    path.write_text(text, encoding="utf-8")
