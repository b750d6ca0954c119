"""Our quantizer: every scheme, scaling, rounding and format, layer by layer on the model's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from tasks.activations.inputs import Inputs
from tasks.formats import load_format
from tasks.grid import Precision
from tasks.hardware import available_memory
from tasks.model.layout import (
    linear_shapes,
    model_layout,
    outer_precisions,
    outer_tensor,
    scale_dtype,
    uniform_precisions,
)
from tasks.model.linears import join
from tasks.quantizers import QuantizeJob
from tasks.quantizers.checks import check_scaled
from tasks.quantizers.layer import Layer, read_layer
from tasks.quantizers.layerwise import Parts
from tasks.quantizers.mixed import choose_precisions
from tasks.quantizers.output_layer import solve_outer
from tasks.quantizers.parallel import press_side_by_side, processes
from tasks.quantizers.propagation import PropagatedActivations
from tasks.quantizers.sensitivity import STATE
from tasks.quantizers.solve import Recipe, solve_layer
from tasks.schemes import MIXED


def press_model(job: QuantizeJob) -> None:
    """Quantize every layer with the statistics of its inputs and write the model; TaskError if it does not fit the
    format."""
    variant = job.variant
    form = load_format(variant.format)
    mixed = variant.scheme == MIXED
    outer = outer_precisions(variant, job.source)
    precisions = choose_precisions(job) if mixed else uniform_precisions(variant, job.source, job.statistics)
    layout = model_layout(variant, job.source, {**precisions, **outer}, job.statistics)
    form.check(layout)
    parts = Parts(job, form, scale_dtype(variant, job.source))
    _press_outside(job, parts, outer)
    if variant.propagate:
        _press_in_order(job, parts, precisions)
    else:
        _press_apart(job, parts, precisions)
    parts.finish(form.describe(layout))
    # only now, so that an interrupted run does not measure again
    (job.destination / STATE).unlink(missing_ok=True)


def _press_outside(job: QuantizeJob, parts: Parts, precisions: Mapping[str, Precision]) -> None:
    """Write the tensors outside the decoder layers; precisions: of the quantized ones."""
    for name, precision in precisions.items():
        weight = solve_outer(job, parts.files, name, precision, Recipe.of(job.variant))
        parts.write_linear(name, weight, precision)
    solved = {f"{outer_tensor(name, parts.files)}.weight" for name in precisions}
    parts.write_dense(name for name in parts.outside() if name not in solved)


def _press_apart(job: QuantizeJob, parts: Parts, precisions: Mapping[str, Precision]) -> None:
    """Quantize layers independently, several at a time where that pays off."""
    todo = parts.missing()
    if job.device == "cpu" and todo:
        weights = sum(rows * width for rows, width in linear_shapes(job.source, job.statistics).values()) // len(
            parts.prefixes
        )
        count = processes(torch.get_num_threads(), len(todo), weights, available_memory())
        if count > 1:
            press_side_by_side(partial(_press_alone, job, precisions), todo, count)
            return
    for index in tqdm(todo, desc="quantizing", unit="layer", disable=not todo):
        _press_layer(job, parts, precisions, index)


def _press_alone(job: QuantizeJob, precisions: Mapping[str, Precision], index: int) -> None:
    """Quantize one layer in its own process."""
    parts = Parts(job, load_format(job.variant.format), scale_dtype(job.variant, job.source))
    _press_layer(job, parts, precisions, index)


def _press_layer(job: QuantizeJob, parts: Parts, precisions: Mapping[str, Precision], index: int) -> None:
    """Quantize one layer independently of the others."""
    layer = _read(job, parts, index)
    own = _own(layer, precisions)
    solved = solve_layer(layer, own, Recipe.of(job.variant), parts.dtype) if own else {}
    check_scaled(job, layer)
    parts.write_layer(layer, solved, own)


def _press_in_order(job: QuantizeJob, parts: Parts, precisions: Mapping[str, Precision]) -> None:
    """Quantize layers in order, each with the activations of the quantized layers before it."""
    stream = PropagatedActivations(job)
    todo = parts.missing()
    for index in tqdm(todo, desc="quantizing", unit="layer", disable=not todo):
        layer = _read(job, parts, index)
        own = _own(layer, precisions)
        if own:
            layer.inputs = stream.inputs(index)
            solved = solve_layer(layer, own, Recipe.of(job.variant), parts.dtype)
            check_scaled(job, layer)
            dense: dict[str, Tensor] = {f"{name}.weight": weight.weight() for name, weight in solved.items()}
            stream.advance(index, join(layer.tensors | dense, layer.structure.linears), own)
        else:
            solved = {}
        parts.write_layer(layer, solved, own)
    stream.close()


def _read(job: QuantizeJob, parts: Parts, index: int) -> Layer:
    """Read a layer; for a skipped one, only its stored weights."""
    own = parts.structure[index]
    if index in job.variant.skip_layers or not own.linears:
        return Layer(index, own, parts.files.below(own.prefix), Inputs.of({}, []))
    return read_layer(job, parts.files, own, index)


def _own(layer: Layer, precisions: Mapping[str, Precision]) -> dict[str, Precision]:
    """The precisions of a layer's linear layers, by name suffix."""
    whole = {name: layer.prefix + name for name in layer.inputs}
    return {name: precisions[full] for name, full in whole.items() if full in precisions}
