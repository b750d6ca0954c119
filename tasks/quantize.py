"""The quantize stage: one variant, made of the downloaded model and what calibration found out about it.

python -m tasks.quantize awq-int4
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.device import compute_device
from tasks.errors import TaskError
from tasks.hardware import peak_memory
from tasks.model.compatibility import check_fit
from tasks.model.precisions import read_precisions
from tasks.model.size import weight_bits
from tasks.output import MANIFEST, link_or_copy, resumable_directory, whole_directory, write_json
from tasks.program import one_argument, run_stage
from tasks.quantizers import QuantizeJob, press
from tasks.quantizers.parallel import held_beside
from tasks.settings import Settings
from tasks.settings.variant import BUILTIN, VariantSettings
from tasks.tensor_files import OUTPUT

# What made the variant, by its backend.
LIBRARIES = {
    "none": (),
    BUILTIN: ("torch", "transformers", "compressed-tensors"),
    "llm-compressor": ("torch", "transformers", "llmcompressor", "compressed-tensors"),
    "autoawq": ("torch", "transformers", "autoawq"),
    "llama.cpp": ("gguf", "llama-cpp-python"),
}
# Files that go with the weights whatever is done to them.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class QuantizeReport:
    """metrics/quantize/V.json.

    recipe: the axes in words, as in `AWQ scaling, clipping, GPTQ`. bits: of a quantized weight; bits_per_weight: with
    scales, zero points and layers left alone, over all linear layers of the decoder. output_layer: its precision;
    output_layer_error: of the logits, relative; None where it stays as it is. peak_memory_bytes: of the stage's
    processes together. tokens: of calibration. layers: each decoder layer's relative output error, given the baseline's
    own input. linears: of the scheme mixed, each linear layer's `name`, the `chosen` precision, and `costs`, the
    divergence that each candidate brings. identity: sha256 of base, calibration, statistics, settings and library
    versions.
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


def quantize(
    name: str, variant: VariantSettings, model: Path, calibration: Path, statistics: Path, destination: Path
) -> QuantizeReport:
    """Make the variant and write its model directory. TaskError if its settings do not fit the model."""
    from safetensors.torch import load_file

    check_fit(name, variant, model)
    device = compute_device()
    backend = "none" if variant.is_baseline else variant.backend
    libraries = {library: version(library) for library in LIBRARIES[backend]}
    tokens = load_file(calibration / "tokens.safetensors")["input_ids"]
    used = tokens[: variant.samples]
    started = time.monotonic()
    key = identity(variant, [model, calibration, *([statistics] if backend == BUILTIN else [])], libraries)
    # ours are written layer by layer, and go on where they were interrupted
    place = resumable_directory(destination, key) if backend == BUILTIN else whole_directory(destination)
    with place as work:
        press(QuantizeJob(model, used, statistics, variant, device, work))
        gc.collect()  # the pressed model makes room
        seconds = round(time.monotonic() - started, 1)
        _add_companions(model, work)
        baseline = variant.is_baseline
        errors = {}
        if not baseline and not any(work.glob("*.gguf")):  # what llama.cpp pressed is in its own types
            from tasks.model.layer_errors import layer_errors  # takes seconds to import

            errors = layer_errors(model, work, used[:2])
        bits = weight_bits(work)
        linears = read_precisions(work)
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
    )


def identity(variant: VariantSettings, inputs: Sequence[Path], libraries: dict[str, str]) -> str:
    """What makes a variant this one and no other: sha256 of the bytes it is made from, of settings and the versions
    of the libraries. TaskError if an input is not whole."""
    parts = [json.dumps(variant.model_dump(), sort_keys=True), json.dumps(libraries, sort_keys=True)]
    for folder in inputs:
        manifest = folder / MANIFEST
        if not manifest.exists():
            raise TaskError(f"{folder} is not there or not whole; run the stages before this one: modelpress run")
        parts.append(manifest.read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _add_companions(model: Path, work: Path) -> None:
    """The tokenizer, template, generation config and licence of the model, byte for byte; nothing private to a file."""
    for pattern in COMPANIONS:
        for file in sorted(model.glob(pattern)):
            (work / file.name).unlink(missing_ok=True)
            link_or_copy(file, work / file.name)
    # a record of llm-compressor's run; params.yaml is ours
    (work / "recipe.yaml").unlink(missing_ok=True)
    for file in work.iterdir():
        if file.stat().st_nlink == 1:
            file.chmod(0o644)


def main() -> None:
    """Quantize the variant that the command line names, in the current directory."""
    name = one_argument("python -m tasks.quantize VARIANT")

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
        print(f"{name}: {report.bits_per_weight} bits a weight, {report.seconds} s")

    run_stage(work)


if __name__ == "__main__":
    main()
