"""The statistics stage: the activation statistics for all quantization methods, from one pass.

python -m tasks.statistics

For each distinct input of each decoder layer's linear layers (q, k and v share one), and of the output layer, the Gram
matrix X^T X and the largest and mean magnitude by channel; of a large model what each layer reads in place of the Gram
matrices (tasks/activations/store.py). The model runs layer by layer; memory holds one layer's weights, its statistics
and the activations. Tokens may be weighted (importance.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.activations.memory import EXPERT_TOKENS, GRAM_GIGABYTES, gram_bytes, grams_kept, needed_bytes
from tasks.activations.plain import collect_plain
from tasks.device import compute_device, fast_dtype
from tasks.hardware import current_memory, peak_memory
from tasks.output import checksums, link_or_copy, resumable_directory, write_json
from tasks.program import run_stage
from tasks.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.model.decoder import Decoder


@dataclass(frozen=True)
class StatisticsReport:
    """metrics/statistics.json. dtype: of the model's matrix products; all else is float32. estimate: see
    `estimate_bytes`. gram_bytes: of all Gram matrices; grams_kept: whether they are on disk, or each variant sums them
    again. few_tokens: the tokens of the experts that saw too few for statistics of their own, by name."""

    tokens: int
    layers: int
    dtype: str
    device: str
    seconds: float
    bytes: int
    estimate_bytes: int
    peak_memory_bytes: int
    gram_bytes: int
    grams_kept: bool
    few_tokens: dict[str, int]


def collect(
    model: Path,
    calibration: Path,
    destination: Path,
    importance: bool,
    least: int = EXPERT_TOKENS,
    gram_gigabytes: float = GRAM_GIGABYTES,
    structure: Path | None = None,
) -> StatisticsReport:
    """Run the model over the calibration tokens; write the files of tasks/activations/store.py, and what the layers
    consist of, structure.json.

    importance: weight the tokens in the layers' Gram matrices by Fisher information (activations/importance.py). least:
    tokens that an expert must see for statistics of its own (activations/gram.py). gram_gigabytes: of Gram matrices on
    disk at most. structure: the model's structure.json, if it is known; None: it is found out and proven.
    An interrupted run resumes at its layer. TaskError if the model has no decoder layers in safetensors files.
    """
    import torch
    from safetensors.torch import load_file

    from tasks.activations.importance import collect_weighed
    from tasks.activations.store import load_few, save_text, write_identity
    from tasks.model.decoder import Decoder
    from tasks.model.structure import FILE, read_structure

    started = time.monotonic()
    device = compute_device()
    decoder = Decoder(model, torch.float32, device, fast_dtype(device))
    tokens = load_file(calibration / "tokens.safetensors")["input_ids"]
    with resumable_directory(destination, _key(model, calibration, decoder, importance, least, gram_gigabytes)) as work:
        if not (work / FILE).exists():
            if structure:
                link_or_copy(structure, work / FILE)
            else:
                find_structure(decoder, model, tokens, work)
        layers = read_structure(work)
        grams = gram_bytes(layer.linears[group[0]].width for layer in layers for group in layer.groups)
        kept = grams_kept(grams, gram_gigabytes)
        if not kept:
            print(
                f"the Gram matrices would take {grams / 1e9:.3g} GB, more than statistics.gram_gigabytes "
                f"({gram_gigabytes:g}); each variant will sum its own",
                flush=True,
            )
            save_text(tokens, work, decoder.products)
        widths = [[layer.linears[group[0]].width for group in layer.groups] for layer in layers]
        estimate = current_memory() + estimate_bytes(decoder, len(tokens), tokens.shape[1], widths, importance, kept)
        print(f"needs about {estimate / 1e9:.1f} GB of memory", flush=True)
        (collect_weighed if importance else collect_plain)(decoder, layers, tokens, work, least, kept)
        write_identity(work, len(layers))
        few = {
            f"{layers[n].prefix}{name}": seen for n in range(len(layers)) for name, seen in load_few(work, n).items()
        }
        size = sum(path.stat().st_size for path in work.iterdir())
    return StatisticsReport(
        tokens=tokens.numel(),
        layers=len(decoder),
        dtype=str(decoder.products).removeprefix("torch."),
        device=device,
        seconds=round(time.monotonic() - started, 1),
        bytes=size,
        estimate_bytes=estimate,
        peak_memory_bytes=peak_memory(),
        gram_bytes=grams,
        grams_kept=kept,
        few_tokens=few,
    )


def find_structure(decoder: Decoder, model: Path, tokens: Tensor, directory: Path) -> None:
    """Find out what the layers of `decoder`, the model in a directory, consist of, compare it with the whole model, and
    write structure.json to `directory`. TaskError if its layers cannot be pressed one by one."""
    import torch

    from tasks.model.decoder import Decoder
    from tasks.model.structure import TOKENS, discover, write_structure
    from tasks.model.whole import check_streamed

    exact = decoder if decoder.products == torch.float32 else Decoder(model, torch.float32, decoder.device)
    text = tokens[:1, :TOKENS]
    found, *hidden = discover(exact, text)
    check_streamed(exact, model, text, *hidden)
    write_structure(found, directory)


def estimate_bytes(
    decoder: Decoder, sequences: int, length: int, widths: Sequence[Sequence[int]], importance: bool, kept: bool
) -> int:
    """The memory that `collect` takes besides what the process has, in bytes: `needed_bytes` of the layer that takes
    the most, or what the comparison with the whole model takes. widths: of each layer's distinct inputs; kept: whether
    Gram matrices are summed."""
    from tasks.model.mapped import in_memory
    from tasks.model.whole import checking_bytes

    hidden, inner, vocabulary = decoder.widths
    needed = partial(
        needed_bytes,
        vocabulary=vocabulary,
        layer_parameters=in_memory(decoder.layer_parameters, decoder.device),
        importance=importance,
        device=decoder.device,
        product=decoder.products.itemsize,
        kept=kept,
    )
    most = max(needed(sequences * length, length, own or (hidden, inner)) for own in widths)
    return max(most, checking_bytes(decoder))


def _key(model: Path, calibration: Path, decoder: Decoder, importance: bool, least: int, gram_gigabytes: float) -> str:
    """The key of all inputs of the statistics."""
    import torch
    import transformers

    parts = [
        torch.__version__,
        transformers.__version__,
        decoder.device,
        str(decoder.products),
        str(importance),
        str(least),
        str(gram_gigabytes),
    ]
    parts += [checksum for folder in (model, calibration) for checksum in sorted(checksums(folder).values())]
    return "\n".join(parts)


def main() -> None:
    """Run the stage on the model and the calibration tokens in the current directory."""

    def work(settings: Settings) -> None:
        asked = settings.statistics
        folders = Path("models/source"), Path("data/calibration"), Path("data/statistics")
        report = collect(*folders, asked.importance, asked.expert_tokens, asked.gram_gigabytes)
        write_json(Path("metrics/statistics.json"), asdict(report))
        print(f"{report.layers} layers, {report.tokens:,} tokens, {report.bytes / 1e6:.0f} MB, {report.seconds} s")

    run_stage(work)


if __name__ == "__main__":
    main()
