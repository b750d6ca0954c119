"""What our own methods share: press one decoder layer after another, and write the model without ever holding it whole.

A layer is its weights and what the statistics stage found out about their inputs; a method turns it into the tensors of
its format. Layers are independent of each other.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tasks.activations.store import Input, load_statistics
from tasks.errors import TaskError
from tasks.grid import QuantizedWeight
from tasks.hardware import available_memory
from tasks.model.family import SOURCES
from tasks.model.linears import linear_shapes
from tasks.output import write_json
from tasks.quantizers import QuantizeJob
from tasks.quantizers.parallel import Again, press_side_by_side, processes
from tasks.solvers import damped
from tasks.tensor_files import TensorFiles, join, save


@dataclass
class Layer:
    """One decoder layer. prefix: of its tensors' names in the model; tensors: by the rest of their names, weights as
    float32 on the job's device; inputs: by linear layer."""

    index: int
    prefix: str
    tensors: dict[str, Tensor]
    inputs: Mapping[str, Input]

    def weight(self, linear: str) -> Tensor:
        """Of a linear layer: [rows, width]."""
        return self.tensors[f"{linear}.weight"]

    def readers(self) -> Iterator[tuple[list[str], Input]]:
        """Linear layers that read the same input, and that input."""
        groups: dict[int, list[str]] = {}
        for linear, known in self.inputs.items():
            groups.setdefault(id(known), []).append(linear)
        for names in groups.values():
            yield names, self.inputs[names[0]]

    def stacked(self, linears: list[str]) -> Tensor:
        """The weights of layers that read the same input, as one: what they make of it does not matter to a solver."""
        return torch.cat([self.weight(name) for name in linears])

    def split(self, solved: QuantizedWeight, linears: list[str]) -> Iterator[tuple[str, QuantizedWeight]]:
        """The solution of `stacked` for each of the layers."""
        start = 0
        for name in linears:
            rows = slice(start, start + len(self.weight(name)))
            yield name, QuantizedWeight(solved.integers[rows], solved.scales[rows], solved.zeros[rows])
            start = rows.stop

    def scalable(self) -> Iterator[tuple[str, list[str]]]:
        """What can take over a factor for each channel of what it makes, and the layers that read that."""
        for source, linears in SOURCES.items():
            # with fewer heads for values than for queries, a value is read through several channels
            if len(self.weight(source)) == len(self.inputs[linears[0]].mean):
                yield source, linears

    def damp(self, share: float) -> None:
        """Add `share` of its mean diagonal to that of every Gram matrix: less is made of the calibration text's own
        correlations, and GPTQ can invert it."""
        found = {id(known): replace(known, gram=damped(known.gram, share)) for known in self.inputs.values()}
        self.inputs = {linear: found[id(known)] for linear, known in self.inputs.items()}

    def scale_input(self, source: str, linears: list[str], scale: Tensor, dtype: torch.dtype) -> None:
        """Multiply the weights of `linears` by `scale` [width] and divide what `source` makes by it.

        A norm's weight is stored in `dtype`: its rounding is made good in the layers that read it, exactly.
        """
        weight = self.tensors[f"{source}.weight"]
        divided = weight / (scale if weight.dim() == 1 else scale[:, None])
        if weight.dim() == 1:
            divided = divided.to(dtype).float()
            scale = torch.where(divided == 0, scale, weight / divided)
        self.tensors[f"{source}.weight"] = divided
        if (bias := self.tensors.get(f"{source}.bias")) is not None:
            self.tensors[f"{source}.bias"] = bias / scale
        for name in linears:
            self.tensors[f"{name}.weight"] = self.weight(name) * scale
        self.inputs = {**self.inputs, **dict.fromkeys(linears, scaled(self.inputs[linears[0]], scale))}


def scaled(known: Input, scale: Tensor) -> Input:
    """What is known of an input after it was divided by `scale` [channels]."""
    return Input(known.gram / scale[:, None] / scale, known.largest / scale, known.mean / scale)


# from a layer to the tensors of each of its linear layers, by the end of their names
Press = Callable[[Layer], Mapping[str, Mapping[str, Tensor]]]


def press_layers(
    job: QuantizeJob,
    press: Press,
    config: dict[str, Any],
    dtype: torch.dtype,
    skip: list[int],
    again: Again | None,
) -> None:
    """Press every layer but those in `skip`, and write weights and config.json to `job.destination`.

    What `press` does not name stays, in `dtype`, as does all outside the layers. config: the `quantization_config`.
    again: how another process does this very thing; None: one layer must follow the other. Of a job with a share its
    layers alone are written.
    """
    files = TensorFiles(job.source)
    described = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    parts = job.destination / "parts.part"
    parts.mkdir(exist_ok=True)
    prefixes = layer_prefixes(job, files)
    outside = [name for name in files if not name.startswith(tuple(prefixes))]
    for name in [] if job.share else outside:
        save({name: _stored(files.read(name), dtype)}, parts / f"{name}.safetensors")

    def left() -> list[int]:
        """The layers of which nothing is there; some may have been made before an interruption."""
        first, step = job.share or (0, 1)
        numbers = range(first, len(prefixes), step)
        return [index for index in numbers if not (parts / f"{prefixes[index]}safetensors").exists()]

    if again and job.share is None and job.device == "cpu":
        weights = sum(math.prod(shape) for shape in linear_shapes(job.source).values()) // len(prefixes)
        count = processes(torch.get_num_threads(), len(left()), weights, available_memory())
        if count > 1:
            press_side_by_side(job, again, count, lambda: len(left()))
    todo = left()
    for index in tqdm(todo, desc="pressing", unit="layer", disable=not todo or job.share is not None):
        prefix = prefixes[index]
        layer = (
            Layer(index, prefix, files.below(prefix), {}) if index in skip else read_layer(job, files, index, prefix)
        )
        packed = press(layer) if layer.inputs else {}
        kept = {name: t for name, t in layer.tensors.items() if name.removesuffix(".weight") not in packed}
        done = {name: _stored(tensor, dtype) for name, tensor in kept.items()}
        done |= {f"{linear}.{end}": tensor for linear, ends in packed.items() for end, tensor in ends.items()}
        save({prefix + name: tensor for name, tensor in done.items()}, parts / f"{prefix}safetensors")
    if job.share:
        return
    join(sorted(parts.glob("*.safetensors")), job.destination)
    shutil.rmtree(parts)
    described |= {"quantization_config": config, "dtype": str(dtype).removeprefix("torch.")}
    write_json(job.destination / "config.json", described)


def layer_prefixes(job: QuantizeJob, files: TensorFiles) -> list[str]:
    """What the names of each decoder layer's tensors begin with."""
    config = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    name = next(name for name in files if ".layers." in name)
    start = name[: name.index(".layers.") + len(".layers.")]
    return [f"{start}{index}." for index in range(config["num_hidden_layers"])]


def read_layer(job: QuantizeJob, files: TensorFiles, index: int, prefix: str) -> Layer:
    """A layer with what is known of its inputs."""
    tensors = {name: tensor.to(job.device, torch.float32) for name, tensor in files.below(prefix).items()}
    return Layer(index, prefix, tensors, load_statistics(job.statistics, index, job.device))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As it goes into the file. TaskError if a number is too large for it, as may happen to a bfloat16 in float16."""
    stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if dtype == torch.float16 and stored.isinf().any():
        raise TaskError(
            f"the model holds numbers up to {tensor.abs().max():.3g}, and the format's float16 ends at 65504; "
            "use method gptq in format compressed-tensors, which keeps the model's own precision"
        )
    return stored


def left_alone(skip: list[int]) -> list[str]:
    """As compressed-tensors names them: the output layer, and the decoder layers that are skipped."""
    return ["lm_head", *(rf"re:.*\.layers\.{index}\..*" for index in skip)]
