"""The divergence caused by one rounded layer, measured layer by layer, equals that of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tasks.grid import Grid, Precision
from tasks.model.structure import read_structure
from tasks.output import whole_directory
from tasks.quantizers import QuantizeJob
from tasks.quantizers import sensitivity as module
from tasks.quantizers.layer import Layer, read_layer
from tasks.quantizers.sensitivity import DAMPING, LENGTH, SEQUENCES, STATE, Sensitivity, measure
from tasks.quantizers.shares import whole_layer
from tasks.quantizers.solve import round_layer
from tasks.settings import VariantSettings
from tasks.solvers import gptq, output_error
from tasks.statistics import collect
from tasks.tensor_files import TensorFiles
from tests.tiny import Corpus

COARSE, FINE = "W4A16_ASYM@32", "W8A16@64"
PRECISIONS = {
    COARSE: Precision(Grid(4, 32, False, torch.float16)),
    FINE: Precision(Grid(8, 64, True, torch.float16)),
}


@pytest.fixture(scope="module")
def made(llama: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> QuantizeJob:
    """A job with statistics; its destination is empty."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("sensitivity")
    with whole_directory(folder / "source") as work:
        for file in llama.iterdir():
            (work / file.name).write_bytes(file.read_bytes())
    tokens = torch.randint(0, 300, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    with whole_directory(folder / "calibration") as work:
        save_file({"input_ids": tokens}, work / "tokens.safetensors")
    collect(folder / "source", folder / "calibration", folder / "statistics", importance=True)
    variant = VariantSettings.model_validate(yaml.safe_load(Path("params.yaml").read_text())["variants"]["auto"])
    return QuantizeJob(folder / "source", tokens, folder / "statistics", variant, "cpu", folder / "out")


@pytest.fixture
def job(made: QuantizeJob, tmp_path: Path) -> QuantizeJob:
    return QuantizeJob(made.source, made.tokens, made.statistics, made.variant, made.device, tmp_path)


def test_divergence_equals_that_of_the_whole_model(job: QuantizeJob) -> None:
    found = measure(job, PRECISIONS)
    model: Any = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    assert len(found) == 14
    ids = job.tokens[:SEQUENCES, :LENGTH]
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
            index = int(name.split(".")[2])
            structure = read_structure(job.statistics)[index]
            files = TensorFiles(job.source)
            layer = read_layer(job, files, whole_layer(index, structure, files.names_below(structure.prefix)))
            linear = name.partition(f"{index}.")[2]
            layer.damp([linear], DAMPING)
            weight, gram = layer.weight(linear), layer.inputs[linear].gram
            coarse = PRECISIONS[COARSE].grid
            rounded = gptq.solve(weight, gram, coarse, act_order=True).weight()
            own = model.get_submodule(name).weight
            kept = own.clone()
            own.copy_(rounded)
            after = model(ids).logits.log_softmax(-1)
            own.copy_(kept)
            divergence = (before.exp() * (before - after)).sum(-1).mean().item()
            assert found[name].divergence == pytest.approx(divergence, rel=0.02, abs=1e-7)
            error = output_error(rounded - weight, gram).sum() / output_error(weight, gram).sum()
            assert found[name].errors[COARSE] == pytest.approx(error.item(), rel=1e-3)


def test_costs_decrease_with_the_errors() -> None:
    one = Sensitivity({COARSE: 0.02, FINE: 0.0001}, 0.004)
    assert one.costs() == {COARSE: pytest.approx(0.004), FINE: pytest.approx(0.00002)}
    assert Sensitivity({COARSE: 0.0}, 0.0).costs() == {COARSE: 0.0}


def test_interrupted_run_resumes_at_its_layer(job: QuantizeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(job, PRECISIONS)
    (job.destination / STATE).unlink()
    solved = []

    def fail_in_the_second(layer: Layer, *rest: Any) -> Any:
        if layer.index == 1:
            raise KeyboardInterrupt
        return round_layer(layer, *rest)

    monkeypatch.setattr(module, "round_layer", fail_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure(job, PRECISIONS)

    def count(layer: Layer, *rest: Any) -> Any:
        solved.append(layer.index)
        return round_layer(layer, *rest)

    monkeypatch.setattr(module, "round_layer", count)
    assert measure(job, PRECISIONS) == whole
    assert set(solved) == {1}
