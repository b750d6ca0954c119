"""One forward pass over the calibration tokens, with equal token weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.activations.store import ROWS, hidden_file, statistics_file
from tasks.tensor_files import save

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.model.decoder import Decoder
    from tasks.model.structure import LayerStructure

STATE, DONE = "state.safetensors", "done"  # the next layer's input, until the last layer


def collect_plain(
    decoder: Decoder, layers: list[LayerStructure], tokens: Tensor, work: Path, least: int, products: bool = True
) -> None:
    """Run all tokens through each layer, one sequence at a time, which fits into the CPU's cache. least: tokens of an
    expert (gram.py); products: whether Gram matrices are summed; else what each layer reads is kept (store.py)."""
    import torch

    from tasks.activations.gram import (
        experts_with_few,
        fill_experts,
        recording_inputs,
        save_output_sums,
        save_sums,
    )

    hidden = decoder.embed(list(tokens.split(1)))
    state = work / STATE
    first = _resume(state, hidden)
    bar = tqdm(range(first, len(decoder)), desc="statistics", unit="layer", initial=first, total=len(decoder))
    for index in bar:
        if index in decoder.order:
            own, origins = layers[index], decoder.origins(index)
            if not products:
                save({ROWS: torch.cat(hidden)}, hidden_file(work, index))
            with decoder.layer(index) as layer, recording_inputs(layer, own, origins, {}, None, products) as sums:
                hidden = [decoder.run(index, layer, rows, batch) for batch, rows in enumerate(hidden)]
            few = experts_with_few(sums, own, least)
            fill_experts(sums, own, few, hidden[0].device, products)
            save_sums(sums, statistics_file(work, index), few)
        save({"hidden": torch.cat(hidden)}, state, {DONE: str(index + 1)})
    save_output_sums(decoder, hidden, work)
    state.unlink()


def _resume(state: Path, hidden: list[Tensor]) -> int:
    """The layer to resume at; `hidden` becomes its input."""
    from safetensors import safe_open

    if not state.exists():
        return 0
    with safe_open(state, framework="pt") as file:
        done = int(file.metadata()[DONE])
        rows = file.get_tensor("hidden").to(hidden[0].device)
    hidden[:] = rows.split(1)
    print(f"resuming at layer {done}", flush=True)
    return done
