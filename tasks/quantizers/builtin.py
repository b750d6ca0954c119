"""Our quantizer: every scheme, scaling, rounding and format, layer by layer on the model's statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from tqdm import tqdm

from tasks.activations.inputs import Inputs
from tasks.formats import load_format
from tasks.grid import Precision
from tasks.hardware import available_memory
from tasks.model.layout import (
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
from tasks.quantizers.layerwise import PARTS, Parts
from tasks.quantizers.mixed import choose_precisions, chosen_precisions
from tasks.quantizers.output_layer import solve_outer
from tasks.quantizers.parallel import job_devices, press_side_by_side
from tasks.quantizers.propagation import PropagatedActivations
from tasks.quantizers.sensitivity import STATE
from tasks.quantizers.shares import Share
from tasks.quantizers.solve import Recipe, solve_layer
from tasks.quantizers.together import is_led, leading
from tasks.schemes import MIXED

WAIT = 0.5  # seconds between two looks at what other processes do


def press_model(job: QuantizeJob) -> None:
    """Quantize every layer with the statistics of its inputs and write the model; TaskError if it does not fit the
    format."""
    variant = job.variant
    form = load_format(variant.format)
    outer = outer_precisions(variant, job.source)
    precisions = choose_precisions(job) if variant.scheme == MIXED else _uniform(job)
    layout = model_layout(variant, job.source, {**precisions, **outer}, job.statistics)
    form.check(layout)
    parts = _parts(job, precisions)
    parts.folder.mkdir(exist_ok=True)
    _press_outside(job, parts, outer)
    if variant.propagate:
        _press_in_order(job, parts, precisions)
    else:
        with leading(parts.folder):
            _press_apart(job, parts, precisions)
    parts.finish(form.describe(layout))
    # only now, so that an interrupted run does not measure again
    (job.destination / STATE).unlink(missing_ok=True)


def help_press(job: QuantizeJob, asked: Callable[[], bool]) -> int:
    """Quantize shares of the model that another process, perhaps on another machine, presses to the same destination,
    until none is left or the process has ended. Returns how many. asked: whether to go on, asked before each share."""
    done = 0
    parts: Parts | None = None
    while asked():
        if not is_led(job.destination / PARTS):
            if parts:
                break
            time.sleep(WAIT)
            continue
        if parts is None:
            precisions = chosen_precisions(job) if job.variant.scheme == MIXED else _uniform(job)
            parts = _parts(job, precisions)
        for share in parts.missing():
            if _press_alone(job, precisions, share, parts):
                done += 1
                break
        else:
            break
    return done


def _uniform(job: QuantizeJob) -> dict[str, Precision]:
    return uniform_precisions(job.variant, job.source, job.statistics)


def _parts(job: QuantizeJob, precisions: Mapping[str, Precision]) -> Parts:
    variant = job.variant
    cut = not variant.propagate  # where each layer needs the dequantized one before it, layers stay whole
    return Parts(job, load_format(variant.format), scale_dtype(variant, job.source), precisions, cut)


def _press_outside(job: QuantizeJob, parts: Parts, precisions: Mapping[str, Precision]) -> None:
    """Write the tensors outside the decoder layers; precisions: of the quantized ones."""
    for name, precision in precisions.items():
        weight = solve_outer(job, parts.files, name, precision, Recipe.of(job.variant))
        parts.write_linear(name, weight, precision)
    solved = {f"{outer_tensor(name, parts.files)}.weight" for name in precisions}
    parts.write_dense(name for name in parts.outside() if name not in solved)


def _press_apart(job: QuantizeJob, parts: Parts, precisions: Mapping[str, Precision]) -> None:
    """Quantize shares of layers independently, several at a time where that pays off, and wait for those that other
    processes have begun."""
    unit = "layer" if all(share.whole for share in parts.shares) else "share"
    while todo := parts.missing():
        devices = job_devices(job.device, todo, available_memory())
        if len(devices) > 1:
            press_side_by_side(partial(_press_alone, job, precisions), todo, devices, unit)
        else:
            for share in tqdm(todo, desc="quantizing", unit=unit):
                _press_alone(job, precisions, share, parts)
        _wait_for_others(parts, unit)


def _wait_for_others(parts: Parts, unit: str) -> None:
    """Wait until all that other processes have begun is there, or one of them has given up."""
    left = parts.missing()
    if left:
        print(f"waiting for {len(left)} {unit}{'s' * (len(left) > 1)} begun by other processes", flush=True)
    while left and not any(parts.is_free(share) for share in left):
        time.sleep(WAIT)
        left = parts.missing()


def _press_alone(
    job: QuantizeJob, precisions: Mapping[str, Precision], share: Share, parts: Parts | None = None
) -> bool:
    """Quantize one share of a layer independently of the others, unless another process is at it; whether it was done
    here. parts: None: in a process of its own."""
    parts = parts or _parts(job, precisions)
    with parts.claimed(share) as mine:
        if mine:
            layer = _read(job, parts, share)
            own = _own(layer, precisions)
            solved = solve_layer(layer, own, Recipe.of(job.variant), parts.dtype) if own else {}
            check_scaled(job, layer, None if share.whole else parts.structure[share.layer])
            parts.write_layer(share, layer, solved, own)
    return mine


def _press_in_order(job: QuantizeJob, parts: Parts, precisions: Mapping[str, Precision]) -> None:
    """Quantize layers in order, each with the activations of the quantized layers before it."""
    stream = PropagatedActivations(job)
    todo = parts.missing()
    for share in tqdm(todo, desc="quantizing", unit="layer", disable=not todo):
        layer = _read(job, parts, share)
        own = _own(layer, precisions)
        if own:
            layer.inputs = stream.inputs(share.layer)
            solved = solve_layer(layer, own, Recipe.of(job.variant), parts.dtype)
            check_scaled(job, layer)
            dense: dict[str, Tensor] = {f"{name}.weight": weight.weight() for name, weight in solved.items()}
            stream.advance(share.layer, join(layer.tensors | dense, layer.structure.linears), own)
        else:
            solved = {}
        parts.write_layer(share, layer, solved, own)
    stream.close()


def _read(job: QuantizeJob, parts: Parts, share: Share) -> Layer:
    """Read a share of a layer; of a skipped layer, only its stored weights."""
    own = share.structure
    if share.layer in job.variant.skip_layers or not own.linears:
        return Layer(share.layer, own, parts.files.below(own.prefix), Inputs.of({}, []))
    return read_layer(job, parts.files, share)


def _own(layer: Layer, precisions: Mapping[str, Precision]) -> dict[str, Precision]:
    """The precisions of a layer's linear layers, by name suffix."""
    whole = {name: layer.prefix + name for name in layer.inputs}
    return {name: precisions[full] for name, full in whole.items() if full in precisions}
