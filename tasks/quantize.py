"""The quantize stage: make one variant from the downloaded model and its calibration statistics.

python -m tasks.quantize awq-int4
"""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.companion_files import companion_files
from tasks.device import compute_device
from tasks.hardware import peak_memory
from tasks.model.compatibility import check_fit
from tasks.model.old_names import with_old_names
from tasks.model.precisions import read_precisions
from tasks.model.size import weight_bits
from tasks.model.structure import overview, read_structure
from tasks.output import link_or_copy, resumable_directory, whole_directory, write_json
from tasks.program import arguments, run_stage
from tasks.quantizers import QuantizeJob, press
from tasks.quantizers.identity import identity_of, read_tokens, versions
from tasks.quantizers.parallel import held_beside
from tasks.settings import Settings
from tasks.settings.variant import VariantSettings
from tasks.tensor_files import OUTPUT, TensorFiles


@dataclass(frozen=True)
class QuantizeReport:
    """metrics/quantize/V.json.

    recipe: the methods in words, such as `AWQ scaling, clipping, GPTQ`. bits: of a quantized weight; bits_per_weight:
    over all linear layers of the decoder, with scales, zero points and unquantized layers. output_layer: its precision;
    output_layer_error: relative error of the logits; both None if unquantized. peak_memory_bytes: total of the stage's
    processes. tokens: of the calibration set. layers: each decoder layer's relative output error on the baseline's
    input. linears: for the scheme mixed, each linear layer's `name`, `chosen` precision, and `costs`, the divergence
    for each candidate. structure: of the decoder as it was found (`overview` of tasks/model/structure.py), empty for
    other backends. kept: the tensors outside the decoder's layers, unchanged, their number by the first two parts of
    their names. identity: sha256 of base, calibration, statistics, settings and library versions.
    """

    variant: str
    scheme: str
    recipe: str
    format: str
    backend: str
    bits: int | None
    bits_per_weight: float | None
    output_layer: str | None
    output_layer_error: float | None
    seconds: float
    peak_memory_bytes: int
    device: str
    tokens: int
    identity: str
    libraries: dict[str, str]
    layers: dict[str, float]
    linears: list[dict[str, Any]]
    structure: dict[str, list[dict[str, Any]]]
    kept: dict[str, int]


def quantize(
    name: str, variant: VariantSettings, model: Path, calibration: Path, statistics: Path, destination: Path
) -> QuantizeReport:
    """Make the variant and write its model directory. TaskError if its settings do not fit the model."""
    check_fit(name, variant, model)
    device = compute_device()
    backend = "none" if variant.is_baseline else variant.backend
    libraries = versions(variant)
    used = read_tokens(variant, calibration)
    started = time.monotonic()
    key = identity_of(variant, model, calibration, statistics)
    # our quantizer writes layer by layer and resumes
    place = resumable_directory(destination, key) if variant.is_ours else whole_directory(destination)
    with place as work:
        press(QuantizeJob(model, used, statistics, variant, device, work))
        gc.collect()  # free the quantized model's memory
        seconds = round(time.monotonic() - started, 1)
        _add_companions(model, work)
        baseline = variant.is_baseline
        if not baseline:
            config = work / "config.json"
            write_json(config, with_old_names(json.loads(config.read_text(encoding="utf-8"))))
        errors = {}
        if not baseline and not any(work.glob("*.gguf")):  # llama.cpp's types cannot be read back
            from tasks.model.layer_errors import layer_errors  # takes seconds to import

            errors = layer_errors(model, work, used[:2])
        bits = weight_bits(work)
        linears = read_precisions(work)
        layers = read_structure(statistics) if variant.is_ours else []
        kept = _kept(work, [layer.prefix for layer in layers])
    return QuantizeReport(
        variant=name,
        scheme=variant.scheme,
        recipe=variant.recipe,
        format="" if baseline else variant.format,
        backend=backend,
        bits=variant.bits,
        bits_per_weight=bits,
        output_layer=variant.output_layer,
        output_layer_error=errors.pop(OUTPUT, None),
        seconds=seconds,
        peak_memory_bytes=max(peak_memory(), held_beside()),
        device=device,
        tokens=0 if baseline else used.numel(),
        identity=key,
        libraries=libraries,
        layers=errors,
        linears=linears,
        structure=overview(layers) if layers else {},
        kept=kept,
    )


def _kept(work: Path, prefixes: list[str]) -> dict[str, int]:
    """The tensors outside the layers with these prefixes, by the first two parts of their names."""
    if not prefixes:
        return {}
    names = [name for name in TensorFiles(work) if not name.startswith(tuple(prefixes))]
    return dict(sorted(Counter(".".join(name.split(".")[:2]) for name in names).items()))


def _add_companions(model: Path, work: Path) -> None:
    """Copy the model's tokenizer, processor, template, generation config and licence, byte for byte."""
    for name in companion_files(file.name for file in model.iterdir()):
        (work / name).unlink(missing_ok=True)
        link_or_copy(model / name, work / name)
    # llm-compressor's record of its run, which params.yaml replaces
    (work / "recipe.yaml").unlink(missing_ok=True)
    for file in work.iterdir():
        if file.stat().st_nlink == 1:
            file.chmod(0o644)


def main() -> None:
    """Quantize the variant that the command line names, in the current directory."""
    (name,) = arguments("python -m tasks.quantize VARIANT")

    def work(settings: Settings) -> None:
        report = quantize(
            name,
            settings.variant(name),
            Path("models/source"),
            Path("data/calibration"),
            Path("data/statistics"),
            Path("models") / name,
        )
        write_json(Path(f"metrics/quantize/{name}.json"), asdict(report))
        print(f"{name}: {report.bits_per_weight} bits per weight, {report.seconds} s")

    run_stage(work)


if __name__ == "__main__":
    main()
