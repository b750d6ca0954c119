"""The whole pipeline on a tiny trained llama, by the flow and by `dvc repro`, with real git, Prefect and MLflow."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.functional.project import ITEMS, PATH, Checkout, params
from tests.functional.toy import cli_command, cli_env
from tests.tiny import Corpus, tiny_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus with more items than the shared one."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), items=ITEMS)


def few(llama: Path, corpus: Corpus) -> dict[str, Any]:
    """`params` with one variant; a second one would take a minute and test nothing more."""
    values = params(llama, corpus)
    del values["variants"]["awq-int4"]
    return values


@pytest.fixture(scope="module")
def by_flow(llama: Path, corpus: Corpus, prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout after `modelpress run` with its own server. Tests must undo their changes."""
    folder = tmp_path_factory.mktemp("flow")
    checkout = Checkout(folder / "project", few(llama, corpus))
    shutil.copytree(prefect_database.parent, checkout.root / ".prefect")
    checkout.output = checkout.run(PREFECT_HOME=str(checkout.root / ".prefect"))  # type: ignore[attr-defined]
    return checkout


def test_the_run_shows_its_result(by_flow: Checkout) -> None:
    output = by_flow.output  # type: ignore[attr-defined]
    assert (by_flow.root / "report/table.txt").read_text().strip() in output
    for place in ("report/index.html", "dist/smollm2-135m-instruct-transformers", "mlflow.db"):
        assert str(by_flow.root / place) in output
    assert "evaluate@transformers-int8" in output
    assert by_flow.runs() == {"parents": 1, "children": 2}


def test_the_evaluated_model_is_packaged(by_flow: Checkout) -> None:
    summary = json.loads((by_flow.root / "report/transformers/summary.json").read_text())
    bundle = by_flow.root / "dist/smollm2-135m-instruct-transformers"
    sizes = {name: v["size_bytes"] for name, v in summary["variants"].items() if v["verdict"] == "pass"}
    assert summary["winner"] == min(sizes, key=lambda name: sizes[name])
    weights = "model.safetensors"
    assert (bundle / weights).read_bytes() == (
        by_flow.root / "exports/transformers" / summary["winner"] / weights
    ).read_bytes()
    by_flow.command("sh", "-c", f"cd {bundle} && sha256sum --check --quiet SHA256SUMS")
    from tasks.runtimes import load_runtime

    assert load_runtime("transformers", bundle, "float32").generate("Anna", 4)
    assert "/" + str(by_flow.root).strip("/") not in (bundle / "provenance.json").read_text()


def test_the_baseline_has_no_loss_against_itself(by_flow: Checkout) -> None:
    base = json.loads((by_flow.root / "metrics/evaluate/transformers/base.json").read_text())
    int8 = json.loads((by_flow.root / "metrics/evaluate/transformers/int8.json").read_text())
    assert all(text["kl"] == 0 and text["top1"] == 1 for text in base["texts"].values())
    assert all(0 < text["kl"] < 0.5 and text["top1"] > 0.5 for text in int8["texts"].values())
    assert base["contract_hash"] == int8["contract_hash"]
    assert {task["items"] for task in base["tasks"].values()} == {ITEMS}
    # the verdict for int8 is certain after fewer items
    assert all(0 < task["items"] < ITEMS for task in int8["tasks"].values())


def test_after_the_flow_dvc_has_nothing_to_do(by_flow: Checkout) -> None:
    assert "up to date" in by_flow.dvc("status")
    assert "up to date" in by_flow.dvc("repro")


def test_a_second_run_changes_nothing(by_flow: Checkout) -> None:
    before = (by_flow.root / "dvc.lock").read_bytes()
    stages = len(by_flow.stages())
    assert by_flow.run().startswith(f"{stages} stages: {stages} unchanged\n")
    assert (by_flow.root / "dvc.lock").read_bytes() == before
    assert by_flow.runs() == {"parents": 1, "children": 2}


def test_a_stage_run_again_by_dvc_gives_the_same_bytes(by_flow: Checkout, tmp_path: Path) -> None:
    copy = copied(by_flow, tmp_path)
    output = copy.dvc("repro", "--force", "--single-item", "quantize@int8")
    assert "Running stage 'quantize@int8'" in output
    same_bytes(by_flow, copy)


@pytest.mark.slow
def test_dvc_repro_gives_the_same_bytes_and_then_the_flow_has_nothing_to_do(
    by_flow: Checkout, llama: Path, corpus: Corpus, tmp_path: Path
) -> None:
    by_dvc = Checkout(tmp_path / "project", few(llama, corpus))
    by_dvc.dvc("repro")
    same_bytes(by_flow, by_dvc)
    output = by_dvc.run()
    assert not {line.split(":")[0] for line in output.splitlines() if ": executed" in line}
    assert by_dvc.runs() == {"parents": 1, "children": 2}


def copied(checkout: Checkout, folder: Path) -> Checkout:
    """A copy of the checkout with all its results."""
    copy = object.__new__(Checkout)
    copy.root = folder / "copy"
    shutil.copytree(checkout.root, copy.root, symlinks=True)
    return copy


def same_bytes(one: Checkout, other: Checkout) -> None:
    ours, theirs = one.stages(), other.stages()
    assert ours.keys() == theirs.keys()
    # report and package contain the times and the git commit of their run
    same = [name for name in ours if name not in ("report", "package@transformers")]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


@pytest.mark.slow
def test_a_change_of_one_variant_runs_its_stages_and_what_follows(by_flow: Checkout, tmp_path: Path) -> None:
    changed = copied(by_flow, tmp_path)
    before = by_flow.stages()
    changed.run("--set", "variants.int8.smoothing=0.4")
    after = changed.stages()
    differing = {name for name in before if before[name] != after[name]}
    assert {"quantize@int8", "export@transformers-int8", "report"} <= differing
    assert not {name for name in differing if name.endswith(("@base", "-base"))}
    assert differing.isdisjoint({"download", "datasets", "calibrate"})
    assert changed.runs() == {"parents": 2, "children": 4}
    assert (changed.root / "dist/smollm2-135m-instruct-transformers/SHA256SUMS").exists()


@pytest.mark.slow
def test_onnx_model_is_evaluated_and_packaged(llama: Path, corpus: Corpus, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "project", params(llama, corpus) | {"targets": ["onnx"]})
    checkout.dvc("repro")
    summary = json.loads((checkout.root / "report/onnx/summary.json").read_text())
    assert summary["contract"]["engine"] == "onnxruntime-genai"
    assert all(v["speed"]["fast_kernel"] for v in summary["variants"].values())
    bundle = checkout.root / "dist/smollm2-135m-instruct-onnx"
    for weights in ("model.onnx", "model.onnx.data"):
        assert (bundle / weights).read_bytes() == (
            checkout.root / "exports/onnx" / summary["winner"] / weights
        ).read_bytes()
    from tasks.runtimes import load_runtime

    assert load_runtime("onnx", bundle, "float32").generate("Anna", 4)


@pytest.mark.slow
@pytest.mark.gguf
def test_gguf_file_is_evaluated_and_packaged(llama: Path, corpus: Corpus, tmp_path: Path) -> None:
    values = params(llama, corpus) | {"targets": ["gguf"]}
    values["variants"]["q4km"] = {"scheme": "Q4_K_M", "imatrix": True}
    checkout = Checkout(tmp_path / "project", values)
    checkout.dvc("repro")
    summary = json.loads((checkout.root / "report/gguf/summary.json").read_text())
    assert summary["contract"]["engine"] == "llama-cpp-python"
    assert all(v["speed"]["fast_kernel"] for v in summary["variants"].values())
    bundle = checkout.root / "dist/smollm2-135m-instruct-gguf"
    exported = checkout.root / "exports/gguf" / summary["winner"] / "model.gguf"
    assert (bundle / "model.gguf").read_bytes() == exported.read_bytes()
    assert not list(bundle.glob("*.safetensors"))
    from tasks.runtimes import load_runtime

    assert load_runtime("gguf", bundle, "float32").generate("Anna", 4)


def test_an_invalid_change_is_refused_and_not_kept(by_flow: Checkout) -> None:
    params = by_flow.root / "params.yaml"
    before = params.read_bytes()
    done = subprocess.run(
        cli_command("run", "--set", "+variants.int8.skip_layers=[9]"),
        cwd=by_flow.root,
        env=cli_env(PATH=PATH),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "names layer 9, but the model has" in done.stderr
    assert done.stderr.rstrip().endswith("params.yaml is unchanged")
    assert params.read_bytes() == before
