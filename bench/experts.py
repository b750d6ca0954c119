"""`python -m bench.experts`: how many tokens an expert needs before statistics of its own are better than the others'.

python -m bench.experts --model models/source --calibration data/calibration        # minutes for 135M

No mixture of experts with real weights is small enough for this. So a trained dense model stands in: the tokens that
reach its MLPs are grouped by k-means, as a router groups tokens that are alike, and each group is an expert's. For each
group, the weights are rounded with the Gram matrix of N of the group's tokens, with that of all groups, and, for what
reads what an expert made, with the diagonal alone; the errors are those on other tokens of the group. Reported are
ratios of the squared errors, own to other: below 1, the group's own statistics are better. The result is written to
bench/results/experts.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tasks.grid import Grid
from tasks.model.decoder import Decoder
from tasks.output import write_json
from tasks.reporting.provenance import machine, versions
from tasks.solvers import damped, gptq, output_error

COUNTS = (16, 32, 64, 128, 256, 512)  # tokens
GROUPS = 16  # experts
TRIED = 4  # of them, the largest
DAMPING = 0.05  # of 4-bit variants
GRID = Grid(4, 64, False, torch.float16)
RESULTS = Path("bench/results/experts.json")
PARTS = {"gate_proj": "others", "down_proj": "diagonal"}


def main(
    model: Annotated[Path, typer.Option(help="a llama-like model, as the stage download leaves it")] = Path(
        "models/source"
    ),
    calibration: Annotated[Path, typer.Option(help="its calibration text")] = Path("data/calibration"),
    layers: Annotated[str, typer.Option(help="decoder layers")] = "4,14,24",
) -> None:
    """Measure and write the result."""
    found: dict[str, dict[int, list[float]]] = {part: {count: [] for count in COUNTS} for part in PARTS}
    wanted = [int(layer) for layer in layers.split(",")]
    for inputs, weights in tqdm(_reads(model, calibration, wanted), desc="layers", total=len(wanted)):
        group = _groups(inputs["gate_proj"])
        for number in group.bincount(minlength=GROUPS).argsort(descending=True)[:TRIED]:
            for part, other in PARTS.items():
                for count, ratio in _ratios(inputs[part], group == number, weights[part], other).items():
                    found[part][count].append(ratio)
    rows = {
        part: [
            {"tokens": count, "ratio": _mean(ratios), "low": min(ratios), "high": max(ratios), "groups": len(ratios)}
            for count, ratios in counts.items()
            if ratios
        ]
        for part, counts in found.items()
    }
    about = {"machine": machine(), "versions": versions(), "layers": wanted, "groups": TRIED}
    write_json(RESULTS, about | {"ratios": rows})
    for part, lines in rows.items():
        print(f"{part}, own statistics against {PARTS[part]}")
        for line in lines:
            print(f"  {line['tokens']:4d} tokens  {line['ratio']:.3f}  ({line['low']:.3f} to {line['high']:.3f})")


def _reads(model: Path, calibration: Path, wanted: list[int]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each layer, what its linear layers read, [tokens, channels], and their weights."""
    decoder = Decoder(model, torch.float32, "cpu")
    hidden = decoder.embed(list(load_file(calibration / "tokens.safetensors")["input_ids"].split(1)))
    with torch.no_grad():
        for index in range(max(wanted) + 1):
            read: dict[str, list[Tensor]] = {part: [] for part in PARTS}
            with decoder.layer(index) as layer:
                modules = {part: layer.get_submodule(f"mlp.{part}") for part in PARTS}
                handles = [
                    module.register_forward_pre_hook(lambda _, args, own=read[part]: own.append(args[0][0]))
                    for part, module in modules.items()
                ]
                hidden = [decoder.run(index, layer, rows, number) for number, rows in enumerate(hidden)]
                weights = {part: layer.get_parameter(f"mlp.{part}.weight").clone() for part in PARTS}
                for handle in handles:
                    handle.remove()
            if index in wanted:
                yield {part: torch.cat(rows) for part, rows in read.items()}, weights


def _groups(x: Tensor) -> Tensor:
    """The group of each token, by k-means over directions."""
    x = torch.nn.functional.normalize(x, dim=1)
    draw = torch.Generator().manual_seed(0)
    centres = x[torch.randperm(len(x), generator=draw)[:GROUPS]]
    for _ in range(20):
        group = (x @ centres.T).argmax(1)
        centres = torch.stack([x[group == n].mean(0) if (group == n).any() else centres[n] for n in range(GROUPS)])
        centres = torch.nn.functional.normalize(centres, dim=1)
    return group


def _ratios(x: Tensor, inside: Tensor, weight: Tensor, other: str) -> dict[int, float]:
    """By number of tokens, the error with the group's own statistics relative to that with the others'."""
    own = x[inside]
    draw = torch.Generator().manual_seed(1)
    own = own[torch.randperm(len(own), generator=draw)]
    known, unseen = own[: len(own) // 2], own[len(own) // 2 :]
    judge = unseen.T @ unseen
    ratios = {}
    for count in (count for count in COUNTS if count <= len(known)):
        few = known[:count]
        gram = few.T @ few
        instead = gram.diagonal().diag() if other == "diagonal" else x[~inside].T @ x[~inside] + gram
        ratios[count] = _error(weight, gram, judge) / _error(weight, instead, judge)
    return ratios


def _error(weight: Tensor, gram: Tensor, judge: Tensor) -> float:
    solved = gptq.solve(weight, damped(gram, DAMPING), GRID, act_order=True).weight()
    return float(output_error(solved - weight, judge).sum())


def _mean(ratios: list[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


if __name__ == "__main__":
    typer.run(main)
