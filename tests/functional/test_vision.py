"""A vision-language model goes through a whole run, and its bundle loads again as the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig

from tasks.checks.smoke import PROMPT
from tasks.reporting.kept import prefix_of
from tasks.runtimes.dense import load_dense
from tasks.tensor_files import TensorFiles
from tests.functional.project import ITEMS, Checkout, params
from tests.tiny import tiny_corpus
from tests.vision import PROCESSOR, tiny_vision


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSOR)
def test_the_bundle_is_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = tiny_vision(tmp_path / "tiny", kind, steps=60, start=f"{PROMPT} a. ")
    values = params(model, tiny_corpus(tmp_path / "corpus", items=ITEMS))
    values["model"]["dtype"] = "float32"
    values["variants"]["awq-int4"] |= {"format": "compressed-tensors", "scale_dtype": None}
    del values["variants"]["int8"]
    project = Checkout(tmp_path / "project", values)
    project.run()
    source, bundle = project.root / "models/source", project.root / f"dist/{values['package']['name']}-transformers"

    # the tower, the projector and the processor are the source's
    before, after = TensorFiles(source), TensorFiles(bundle)
    tower = [name for name in before if "vis" in name or "projector" in name]
    assert tower
    assert all(torch.equal(before.read(name), after.read(name)) for name in tower)
    starts = {prefix_of(name) for name in tower}
    kept = json.loads((bundle / "provenance.json").read_text())["kept"]
    assert sum(group["tensors"] for name, group in kept["unchanged"].items() if name in starts) == len(tower)
    assert kept["files"] == sorted(PROCESSOR[kind])
    card = (bundle / "README.md").read_text()
    for name in PROCESSOR[kind]:
        assert (bundle / name).read_bytes() == (model / name).read_bytes()
        assert f"- `{name}`" in card
    assert "model = AutoModelForImageTextToText.from_pretrained(folder" in card
    if kind == "gemma3":  # Qwen's needs torchvision, for videos
        AutoProcessor.from_pretrained(bundle)

    # Transformers reads it as the whole, as our reader does
    whole = AutoModelForImageTextToText.from_pretrained(
        bundle, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert type(whole).__name__ == json.loads((model / "config.json").read_text())["architectures"][0]
    ids = torch.arange(6, 60)[None]
    with torch.no_grad():
        found, right = (one.eval()(input_ids=ids).logits for one in (whole, load_dense(bundle, torch.float32)))
    assert torch.allclose(found, right, atol=1e-4)
