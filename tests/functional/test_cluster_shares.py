"""Idle workers of a real Dask cluster quantize shares of a real, tiny mixture of experts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.functional.project import Checkout, params
from tests.tiny import Corpus, tiny_model

pytest.importorskip("prefect_dask")
pytestmark = pytest.mark.slow

EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": []}


def pressed(root: Path, model: Path, corpus: Corpus, prefect_server: str, *options: str) -> tuple[str, bytes]:
    """The output of a run in a new checkout in which each expert is a share, and the quantized weights."""
    values = params(model, corpus)
    values["variants"] = {name: values["variants"][name] for name in ("base", "awq-int4")}
    values["variants"]["awq-int4"] |= {"format": "compressed-tensors"}
    checkout = Checkout(root, values)
    shares = root / "tasks/quantizers/shares.py"
    text, cuts = re.subn(r"^LARGEST = \S+", "LARGEST = 1", shares.read_text(encoding="utf-8"), flags=re.M)
    assert cuts == 1
    shares.write_text(text, encoding="utf-8")
    output = checkout.run(*options, PREFECT_API_URL=prefect_server, MODELPRESS_ASSIST_AFTER="0")
    return output, (root / "models/awq-int4/model.safetensors").read_bytes()


def test_workers_share_a_mixture_and_the_bytes_are_those_of_one_process(
    corpus: Corpus, tmp_path: Path, prefect_server: str
) -> None:
    model = tiny_model(tmp_path / "tiny", family="qwen3_moe", hidden=256, layers=6, steps=60, changes=EXPERTS)
    output, together = pressed(tmp_path / "cluster", model, corpus, prefect_server, "--runner", "dask", "--jobs", "3")
    helped = re.findall(r"awq-int4: quantized (\d+) layers? or shares of them here", output)
    assert max(map(int, helped), default=0) > 1, output
    _, alone = pressed(tmp_path / "threads", model, corpus, prefect_server)
    assert together == alone
