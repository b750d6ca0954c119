"""With equivalent settings, integers and scales equal those of commit 7e53a78 on this machine.

Both are computed here, because the last bits of a result depend on the processor: the old code runs from a copy of that
commit in its own process, on the same model and statistics.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tasks.formats.stored import StoredModel
from tasks.old_words import new_variant
from tasks.output import checksums, whole_directory
from tasks.quantize import quantize
from tasks.settings import check_settings
from tasks.statistics import collect
from tests.tiny import Corpus

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "7e53a78"  # the last commit with methods
LENGTH = 32
INT8 = {"method": "int8", "backend": "modelpress", "smoothing": 0.5, "rounding": "gptq", "symmetric_activations": False}
GPTQ = {
    "method": "gptq",
    "backend": "modelpress",
    "bits": 4,
    "group_size": 32,
    "symmetric": False,
    "damping": 0.05,
    "act_order": "static",
    "clip": True,
    "refine": 1,
    "propagate": False,
    "format": "compressed-tensors",
}
AWQ = {
    "method": "awq",
    "backend": "modelpress",
    "bits": 4,
    "group_size": 32,
    "clip": True,
    "rounding": "gptq",
    "refine": 1,
    "propagate": False,
    "format": "awq",
}
AUTO = {
    "method": "auto",
    "backend": "modelpress",
    "bits_per_weight": 5.2,
    "fused": False,
    "refine": 2,
    "candidates": ["4@32", "4@64", "8@32"],
    "propagate": False,
}
# variants with the settings of that commit
OLD: dict[str, dict[str, Any]] = {
    "int8": INT8,
    "int8-nearest": {**INT8, "rounding": "nearest", "symmetric_activations": True, "skip_layers": [1]},
    "gptq": GPTQ,
    "gptq-symmetric": {**GPTQ, "symmetric": True, "act_order": "none", "clip": False, "refine": 0, "damping": 0.01},
    "gptq-propagated": {**GPTQ, "propagate": True},
    "gptq-autogptq": {**GPTQ, "format": "gptq"},
    "awq": AWQ,
    "awq-nearest": {**AWQ, "rounding": "nearest", "refine": 0, "clip": False, "format": "compressed-tensors"},
    "auto": AUTO,
    "auto-fused": {**AUTO, "fused": True},
}
# runs in a copy of the old code: collects statistics, quantizes each variant, and writes the solutions of its layers
PRESS = """
import json, sys
from pathlib import Path
import yaml
from safetensors.torch import save_file
from tasks.formats.stored import StoredModel
from tasks.program import set_environment
from tasks.quantize import quantize
from tasks.settings import check_settings
from tasks.statistics import collect
set_environment()
params, variants, model, calibration, statistics, out = sys.argv[1:]
values = yaml.safe_load(Path(params).read_text())
collect(Path(model), Path(calibration), Path(out) / "statistics", True)
for name, variant in json.loads(variants).items():
    values["variants"] = {"base": {"method": "none"}, name: variant}
    settings = check_settings(values).variant(name)
    folder = Path(out) / name
    quantize(name, settings, Path(model), Path(calibration), Path(statistics), folder)
    stored = StoredModel(folder)
    solved = {layer: stored.linear(layer).solved for layer in stored.quantized}
    ends = ("integers", "scales", "zeros")
    parts = {f"{layer}.{end}": getattr(s, end).contiguous() for layer, s in solved.items() for end in ends}
    save_file(parts, Path(out) / f"{name}.safetensors")
"""


@pytest.fixture(scope="module")
def inputs(llama: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model, its calibration tokens and its statistics."""
    base = tmp_path_factory.mktemp("inputs")
    ids = AutoTokenizer.from_pretrained(llama)(corpus.text.read_text()).input_ids
    with whole_directory(base / "calibration") as work:
        save_file({"input_ids": torch.tensor(ids[: 16 * LENGTH]).view(16, LENGTH)}, work / "tokens.safetensors")
    with whole_directory(base / "model") as work:
        for file in llama.iterdir():
            (work / file.name).write_bytes(file.read_bytes())
    collect(base / "model", base / "calibration", base / "statistics", importance=True)
    return {name: base / name for name in ("model", "calibration", "statistics")}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the old commit."""
    folder = tmp_path_factory.mktemp("before")
    archive = folder / "before.tar"
    names = ("tasks", "params.yaml", "pyproject.toml")
    command = ["git", "archive", "--output", str(archive), BEFORE, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this checkout has no commit {BEFORE}: a shallow clone, or no git")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def old(before: Path, inputs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the old code's statistics, and its solutions, a file for each variant."""
    out = tmp_path_factory.mktemp("old")
    arguments = [str(before / "params.yaml"), json.dumps(OLD), *map(str, inputs.values()), str(out)]
    done = subprocess.run(
        [sys.executable, "-c", PRESS, *arguments], cwd=before, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", OLD)
def test_translated_variant_has_the_old_bytes(name: str, old: Path, inputs: Mapping[str, Path], tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["variants"] = {"base": {"scheme": "none"}, name: new_variant(OLD[name])}
    variant = check_settings(values).variant(name)
    folders = (inputs["model"], inputs["calibration"], inputs["statistics"])
    quantize(name, variant, *folders, tmp_path / "new")
    expected, stored = load_file(old / f"{name}.safetensors"), StoredModel(tmp_path / "new")
    assert {key.rpartition(".")[0] for key in expected} == set(stored.quantized) != set()
    for layer in stored.quantized:
        found = stored.linear(layer).weight
        for part in ("integers", "scales", "zeros"):
            before, now = expected[f"{layer}.{part}"], getattr(found, part)
            assert before.dtype == now.dtype
            assert torch.equal(before, now), (layer, part)


def test_statistics_have_the_old_bytes(old: Path, inputs: Mapping[str, Path]) -> None:
    found = checksums(inputs["statistics"])
    del found["structure.json"], found["identity.txt"]  # newer
    assert checksums(old / "statistics") == found
