"""A model quantized in shares of its layers, and by several processes at once: the same tensors, each once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tasks.errors import TaskError
from tasks.model.structure import LayerStructure, read_structure
from tasks.output import checksums, whole_directory
from tasks.quantize import quantize
from tasks.quantizers import builtin, shares
from tasks.quantizers.assist import assist
from tasks.quantizers.layerwise import Parts
from tasks.quantizers.shares import Share
from tasks.quantizers.together import claimed
from tasks.settings import VariantSettings
from tasks.statistics import collect
from tests.functional.test_damage import KINDS
from tests.tiny import tiny_model
from tests.waiting import soon

VARIANTS = yaml.safe_load(Path("params.yaml").read_text())["variants"]
METHODS: dict[str, dict[str, Any]] = {
    "gptq": VARIANTS["gptq-int4"] | {"group_size": 32},
    "awq": VARIANTS["awq-int4"] | {"group_size": 32},
    "int8": VARIANTS["int8"],
    "mixed": VARIANTS["auto"] | {"candidates": ["W4A16_ASYM@32", "W8A8", "none"], "bits_per_weight": 9.0, "refine": 0},
}
TWO_EXPERTS = 80_000  # bytes: weights and Gram matrices of about two experts


class Made:
    """A model, its statistics, and its variants in one piece."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        tiny = tiny_model(folder / "tiny", family=kind, changes=KINDS.get(kind, {}))
        with whole_directory(folder / "models/source") as work:
            for file in tiny.iterdir():
                (work / file.name).write_bytes(file.read_bytes())
        ids = torch.randint(6, 200, (4, 64), generator=torch.Generator().manual_seed(0))
        with whole_directory(folder / "data/calibration") as work:
            save_file({"input_ids": ids}, work / "tokens.safetensors")
        self.folders = folder / "models/source", folder / "data/calibration", folder / "data/statistics"
        collect(*self.folders, importance=True, least=16)

    def press(self, method: str, name: str) -> Path:
        variant = VariantSettings.model_validate(METHODS[method])
        destination = self.folder / "models" / name
        if not destination.exists():
            quantize(name, variant, *self.folders, destination)
        return destination


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("llama", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def write_params(folder: Path, name: str, values: dict[str, Any]) -> None:
    """The project's settings, and one more variant."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["variants"][name] = values
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def cut(monkeypatch: pytest.MonkeyPatch, largest: int) -> list[Share]:
    """Cut layers into shares of at most this size from now on. Returns the shares of models pressed afterwards."""
    real, found = shares.shares, []

    def smaller(index: int, structure: LayerStructure, names: Any, solved: Any, grouped: bool) -> list[Share]:
        own = real(index, structure, names, solved, grouped, largest)
        found.extend(own)
        return own

    monkeypatch.setattr("tasks.quantizers.layerwise.shares", smaller)
    return found


@pytest.mark.parametrize("largest", [1, TWO_EXPERTS])
@pytest.mark.parametrize("method", METHODS)
def test_shares_give_the_same_tensors(method: str, largest: int, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made.press(method, method)
    found = cut(monkeypatch, largest)
    pressed = made.press(method, f"{method}-{largest}")
    assert len(found) > 2 * 2  # two layers
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, pressed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    others = [
        {n: sum_ for n, sum_ in checksums(folder).items() if n != "model.safetensors"} for folder in (whole, pressed)
    ]
    assert others[0] == others[1]


def test_each_tensor_belongs_to_one_share(made: Made) -> None:
    for index, structure in enumerate(read_structure(made.folders[2])):
        files = load_file(made.folders[0] / "model.safetensors")
        names = [name.removeprefix(structure.prefix) for name in files if name.startswith(structure.prefix)]
        found = shares.shares(index, structure, names, set(structure.linears), False, 1)
        written = [
            name for one in found for name in (*one.others, *(own.tensor for own in one.structure.linears.values()))
        ]
        assert sorted(written) == sorted(names)
        assert len({one.file for one in found}) == len(found) > 2
        assert shares.shares(index, structure, names, set(structure.linears), False) == [
            shares.whole_layer(index, structure, names)
        ]


def test_what_factors_move_between_stays_together(made: Made) -> None:
    structure = read_structure(made.folders[2])[1]
    found = shares.shares(1, structure, [], set(structure.linears), True, 1)
    for pair in structure.usable(True):
        inside = [one for one in found if set(pair.readers) <= one.structure.linears.keys()]
        assert len(inside) == 1
        assert pair.source in inside[0].structure.linears or pair.source not in structure.linears
        assert pair in inside[0].structure.pairs


@pytest.mark.parametrize("helpers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_other_processes_help(helpers: int, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a process of its own that has only the folder; each share is quantized once."""
    name = f"helped-{helpers}"
    whole = made.press("awq", "awq")
    write_params(made.folder, name, METHODS["awq"])
    command = [sys.executable, "-m", "tasks.quantizers.assist", name]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    others = [
        subprocess.Popen(command, cwd=made.folder, env=env, stdout=subprocess.PIPE, text=True) for _ in range(helpers)
    ]
    mine: list[str] = []
    real = Parts.write_layer

    def write(parts: Parts, share: Share, *rest: Any) -> None:
        """After its first share, the stage waits for the helpers."""
        real(parts, share, *rest)
        mine.append(share.file)
        if len(mine) == 1:
            assert soon(lambda: len(list(parts.folder.glob("*.layers.*.safetensors"))) > 1, 120)

    monkeypatch.setattr(Parts, "write_layer", write)
    variant = VariantSettings.model_validate(METHODS["awq"])
    quantize(name, variant, *made.folders, made.folder / "models" / name)
    said = [helper.communicate(timeout=60)[0] for helper in others]
    counts = [re.search(r"quantized (\d+) layer", line) for line in said]
    helped = sum(int(one[1]) for one in counts if one)
    assert len(mine) + helped == 2  # layers
    assert helped
    assert checksums(made.folder / "models" / name) == checksums(whole)


def test_the_stage_waits_for_what_another_has_begun_and_says_so_once(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other gives up: the stage quantizes that share as well."""
    whole = made.press("gptq", "gptq")
    monkeypatch.setattr(builtin, "WAIT", 0.02)
    held = ExitStack()
    real = Parts.write_layer

    def write(parts: Parts, share: Share, *rest: Any) -> None:
        real(parts, share, *rest)
        if share.layer == 0:  # another process begins the next one
            assert held.enter_context(parts.claimed(parts.shares[1]))
            threading.Timer(1.0, held.close).start()

    monkeypatch.setattr(Parts, "write_layer", write)
    assert checksums(made.press("gptq", "waited")) == checksums(whole)
    assert capsys.readouterr().out.count("waiting for 1 layer begun by other processes") == 1


def test_nothing_is_claimed_of_a_finished_model(tmp_path: Path) -> None:
    with claimed(tmp_path / "gone/model.layers.0.safetensors") as mine:
        assert not mine


def test_a_helper_ends_with_the_stage_or_when_it_is_told(made: Made, tmp_path: Path) -> None:
    """Nobody leads: it waits, until the file is gone."""
    variant = VariantSettings.model_validate(METHODS["gptq"])
    until = tmp_path / "until"
    until.touch()
    threading.Timer(1.0, until.unlink).start()
    assert assist("none", variant, *made.folders, made.folder / "models/none", until) == 0


def test_the_program_says_what_it_cannot_help_with(made: Made) -> None:
    write_params(made.folder, "int8", METHODS["int8"])
    command = [sys.executable, "-m", "tasks.quantizers.assist", "base"]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=made.folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: base is not quantized in shares")
    with pytest.raises(TaskError, match="without propagate"):
        assist("v", VariantSettings.model_validate(METHODS["gptq"] | {"propagate": True}), *made.folders, made.folder)
