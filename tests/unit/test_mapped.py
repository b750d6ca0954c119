"""Large tensors in files: the same numbers, and hardly any memory of the process itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.model import mapped
from tasks.model.decoder import Decoder
from tasks.model.mapped import LARGE, Mapped
from tests.tiny import tiny_model

NUMBERS = LARGE // 4


def in_file(tensor: Tensor) -> bool:
    """Whether the tensor's memory is a file's."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split(" ")[0].split("-"))
        if start <= address < end:
            return "(deleted)" in line
    raise AssertionError("not mapped at all")


@pytest.mark.parametrize("turned", [False, True])
def test_copies_of_large_tensors_are_in_files(turned: bool, tmp_path: Path) -> None:
    one = torch.arange(2 * NUMBERS, dtype=torch.bfloat16).view(2, NUMBERS)
    one = one.T if turned else one
    expected = [one.float(), one.clone(), torch.cat([one, one]), torch.stack([one, one], 1), one.contiguous()]
    with Mapped(tmp_path):
        found = [one.float(), one.clone(), torch.cat([one, one]), torch.stack([one, one], 1), one.contiguous()]
        small = one[:1, :1].float()
    for new, old in zip(found, expected, strict=True):
        assert torch.equal(new, old)
        assert (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride())
        assert in_file(new) == (new is not one.contiguous() and new.data_ptr() != one.data_ptr())
    assert not in_file(small)
    assert not list(tmp_path.iterdir())
    found[0].mul_(2)
    assert torch.equal(found[0], 2 * expected[0])


def test_a_large_layer_runs_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(6, 200, (1, 24))

    def run() -> tuple[Tensor, list[bool]]:
        decoder = Decoder(model, torch.float32, "cpu")
        (hidden,) = decoder.embed([tokens])
        with decoder.layer(0) as layer:
            there = [in_file(parameter) for parameter in layer.parameters() if parameter.dim() > 1]
            return decoder.run(0, layer, hidden), there

    plain, there = run()
    assert not any(there)
    monkeypatch.setattr(mapped, "LAYER", 1)
    monkeypatch.setattr(mapped, "LARGE", 1)
    again, there = run()
    assert all(there)
    assert torch.equal(plain, again)


STACK = """
import resource, sys, torch
from contextlib import nullcontext
from pathlib import Path
from tasks.model.mapped import Mapped

used = int(Path("/proc/self/statm").read_text().split()[5]) * 4096  # data and stack
resource.setrlimit(resource.RLIMIT_DATA, (used + 300_000_000,) * 2)
parts = [torch.ones(1, dtype=torch.bfloat16).expand(25_000_000)] * 8
with Mapped(Path(sys.argv[2])) if sys.argv[1] == "files" else nullcontext():
    print(torch.stack(parts).float().sum(1))
"""


@pytest.mark.parametrize("place", ["files", "memory"])
def test_more_than_the_memory(place: str, tmp_path: Path) -> None:
    """Experts of 0.8 GB in float32, where the process may have 0.3."""
    done = subprocess.run([sys.executable, "-c", STACK, place, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode == 0) == (place == "files"), done.stderr
