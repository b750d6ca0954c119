"""Refuse a model that is too large for package.hardware before any work starts, by the size of its variants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tasks.deployment.shape import Shape, read_shape
from tasks.deployment.sizing import gigabytes, plan
from tasks.errors import TaskError
from tasks.model.hollow import variant_bytes
from tasks.reporting.engines import why_not_vllm
from tasks.schemes import LLAMA_CPP
from tasks.settings import HardwareSettings, Settings, VariantSettings
from tasks.targets import files_of
from tasks.tensor_files import TensorFiles


def check_serving_memory(settings: Settings, model: Path) -> None:
    """TaskError if for some target no variant of `model` can fit the machines that package.hardware describes, so that
    the stage package would refuse each. Of the model, config.json and the shapes of its tensors are read."""
    if settings.package.hardware is not None:
        for target in settings.targets:
            _check_target(settings, settings.package.hardware, target, model)


def _check_target(settings: Settings, hardware: HardwareSettings, target: str, model: Path) -> None:
    if target == "onnx" and hardware.gpu is not None:  # its files are for a CPU, whose memory is not described
        return
    baseline, shapes = read_shape(model), {}
    for name, variant in settings.variants.items():
        if variant.is_baseline:
            continue
        if files_of(target) == "transformers" and why_not_vllm(name, variant):
            return  # it is packaged without files for servers
        shapes[name] = variant_shape(baseline, variant, model)
    refusals = {}
    for name, shape in shapes.items():
        try:
            plan(shape, hardware)
        except TaskError as error:
            refusals[name] = error
        else:
            return
    smallest = min(shapes, key=lambda name: shapes[name].weights)
    files, size = TensorFiles(model), shapes[smallest].weights
    bits = 8 * size / sum(files.entry(name).count for name in files)
    raise TaskError(
        f"the smallest variant, {smallest}, will have about {bits:.1f} bits per weight, together "
        f"{gigabytes(size)}, and could not be packaged: {refusals[smallest]}"
    ) from refusals[smallest]


def variant_shape(baseline: Shape, variant: VariantSettings, model: Path) -> Shape:
    """The shape that a variant of `model` will have, estimated (see `variant_bytes`). baseline: the model's own."""
    variant = _least(variant)
    size = variant_bytes(variant, model)
    if variant.scheme in LLAMA_CPP:
        return replace(baseline, layer_bytes=size, outer_bytes=0)
    plain = variant.model_copy(update={"output_layer": None, "embedding": None})
    inside = variant_bytes(plain, model) - baseline.outer_bytes
    groups = [value for key, value in variant.group_sizes if key in ("group_size", "candidates")]
    return replace(baseline, layer_bytes=inside, outer_bytes=size - inside, group=max(groups, default=baseline.group))


def _least(variant: VariantSettings) -> VariantSettings:
    """The variant at its smallest: a mixture with the budget `retention` may take its smallest candidate everywhere."""
    if variant.retention is None:
        return variant
    return variant.model_copy(update={"retention": None, "bits_per_weight": float(variant.bits or 16)})
