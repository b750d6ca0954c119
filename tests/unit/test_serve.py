"""The serve stage: what it records of a model that is served, served wrongly, not served, or not servable here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import onnx
import pytest

from tasks.errors import TaskError
from tasks.hardware import cpu_cores
from tasks.output import link_or_copy
from tasks.scoring.completions import Completion, prompts, write_completions
from tasks.scoring.divergence import text_windows
from tasks.serve import Evaluated, ServeReport, serve, summary_line
from tasks.serving import engines
from tasks.serving.agreement import compared
from tasks.serving.api import Answer
from tasks.serving.near_ties import GAPS, INTEGER_KERNELS, MEANS, Parting, computed_in, parting
from tasks.serving.onnx_server.options import read_options
from tasks.serving.process import NotServableHere
from tasks.settings import load_settings
from tests.functional.pressing import Pressing
from tests.openai_fake import Model
from tests.tiny import Corpus, tiny_model
from tests.unit.test_serving_checks import evaluated
from tests.unit.test_serving_process import ROOT, Fake

Stage = Callable[..., ServeReport]
CONTEXT = 256  # of the invented model


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus) -> Stage:
    """Run the stage with the invented server; its evaluation wrote what the invented model says."""
    model = Model()
    folder, results, raw = tmp_path / "exports", tmp_path / "results", tmp_path / "raw"
    folder.mkdir()
    model.tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "max_position_embeddings": CONTEXT, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    results.mkdir()
    write_completions(results, evaluated(model, len(prompts())))
    settings = load_settings(ROOT / "params.yaml").evaluation.model_copy(update={"text_tokens": 128, "window": 64})
    for text, source in settings.texts.items():
        (raw / text).mkdir(parents=True)
        (raw / text / "data.jsonl").write_text(getattr(corpus, text).read_text())
        rows = []
        for number, window in enumerate(text_windows(model.tokenizer, raw, text, source, 128, 64)):
            nll = -sum(model.logprob(window.ids[:n], window.ids[n]) for n in range(1, len(window.ids)))
            rows.append({"window": number, "tokens": len(window.ids) - 1, "nll": nll})
        (results / f"windows-{text}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = Fake()
    monkeypatch.setitem(engines.ENGINES, "fake", lambda: engine)

    def run(name: str = "v", faults: Sequence[str] = (), target: str = "fake") -> ServeReport:
        engine.faults = faults
        return serve(name, target, folder, Evaluated(results, raw, settings), tmp_path / "log")

    return run


def test_a_model_that_does_all_as_evaluated_is_served(stage: Stage) -> None:
    report = stage()
    assert (report.state, report.reason) == ("served", None)
    assert {one.state for one in report.findings} <= {"passed", "not offered"}
    assert report.agreement
    assert (report.agreement.equal, report.agreement.texts) == (16, 16)
    assert report.agreement.difference == pytest.approx(0, abs=1e-6)
    assert (report.engine, report.version) == ("fake", "1.0")
    assert report.start_seconds
    assert report.peak_memory_bytes
    assert set(report.agreement.by_text) == {"news", "medical"}
    text = json.dumps(asdict(report), allow_nan=False)
    assert str(Path.home()) + "/" not in text
    assert "16 of 16 greedy texts equal" in summary_line(report)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("ignores stop", "stop strings: "),
        ("shifted", "the mean log-probability of 252 tokens differs by \\+0.01000 nats"),
        ("other tokens", "greedy text 1, token 4: "),
        ("does not start", "fake ended with status 1; its last words: ValueError: no kernel for model"),
    ],
)
def test_a_variant_that_answers_otherwise_is_not_served(stage: Stage, fault: str, reason: str) -> None:
    report = stage(faults=[fault])
    assert report.state == "not served"

    found = [f"{one.check}: {one.detail}" for one in report.findings if one.state == "failed"]
    found += report.agreement.problems if report.agreement else []
    assert any(re.match(reason, one) for one in (report.reason or "", *found))
    assert re.search(r" \(and \d+ more\)$", report.reason or "") or len(found) < 2
    assert "not served" in summary_line(report)


@pytest.mark.parametrize("fault", ["shifted", "does not start"])
def test_a_baseline_that_answers_otherwise_stops_the_run(stage: Stage, fault: str) -> None:
    with pytest.raises(TaskError, match=r"the baseline is not served by fake: .*see .*log"):
        stage("base", faults=[fault])


def test_a_model_that_needs_another_machine_is_not_servable_here(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "not_here", lambda self, folder, words: "needs AMX")
    report = stage(faults=["does not start"])
    assert (report.state, report.reason, report.engine) == ("not servable here", "needs AMX", "fake")


def test_a_library_has_no_server(stage: Stage) -> None:
    report = stage(target="transformers")
    assert report.state == "no server"
    assert "no server" in summary_line(report)


def test_missing_records_are_found_before_a_server_starts(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "results/windows-news.jsonl").write_text('{"window": 0, "tokens": 7, "nll": 1.0}\n')
    with pytest.raises(TaskError, match="line 1 is not of the window that the settings give"):
        stage()
    (tmp_path / "results/texts.jsonl").unlink()
    with pytest.raises(TaskError, match="make it with: dvc repro evaluate@fake-v"):
        stage()
    assert not (tmp_path / "log").exists()


BEST = [[(1, -0.5), (2, -0.505)], [(3, -0.1), (4, -3.0)]]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([1, 3], None),
        ([2, 9], (0, True)),  # the second token of a near-tie
        ([5, 3], (0, False)),  # neither
        ([1, 4], (1, False)),  # the second token, but far below
        ([1], (1, False)),  # shorter
        ([1, 3, 7], (2, False)),
    ],
)
def test_where_texts_part(other: list[int], expected: tuple[int, bool] | None) -> None:
    found = parting([1, 3], BEST, other, 0.01)
    assert (found and (found.place, found.near_tie)) == expected
    if found and len(other) == 2:
        assert "the two best tokens differ by" in str(found)
    assert str(Parting(1, None, False)) == "token 2: one text ends there"


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"dtype": "float16"}, "auto", "float16"),
        ({"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"text_config": {"dtype": "float32"}}, "auto", "float32"),
        ({"dtype": "bfloat16"}, "float32", "float32"),
        ({}, "auto", "bfloat16"),
        ({"quantization_config": {"config_groups": {"0": {"input_activations": {"num_bits": 8}}}}}, "auto", "rounded"),
        (
            {"quantization_config": {"config_groups": {"0": {"input_activations": None}}}, "dtype": "float16"},
            "auto",
            "f",
        ),
    ],
)
def test_what_a_model_computes_in(tmp_path: Path, config: dict[str, object], dtype: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = computed_in(tmp_path, dtype)
    assert found.startswith(expected)
    assert found in GAPS
    assert found in MEANS


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("MODELPRESS_VLLM_PYTHON"), reason="MODELPRESS_VLLM_PYTHON names no interpreter with vLLM"
)
def test_a_tiny_model_is_served_by_vllm_as_evaluated(llama: Path, corpus: Corpus, tmp_path: Path) -> None:
    import torch

    from tasks.runtimes import load_runtime
    from tasks.scoring.completions import complete
    from tasks.scoring.divergence import measure_text
    from tasks.scoring.evaluation import write_text_rows

    settings = load_settings(ROOT / "params.yaml").evaluation.model_copy(update={"text_tokens": 1024, "window": 128})
    runtime = load_runtime("transformers", llama, "float32")
    results, raw = tmp_path / "results", tmp_path / "raw"
    results.mkdir()
    with torch.inference_mode():
        write_completions(results, complete(runtime, [1], prompts()))
        for text, source in settings.texts.items():
            (raw / text).mkdir(parents=True)
            (raw / text / "data.jsonl").write_text(getattr(corpus, text).read_text())
            windows = text_windows(runtime.tokenizer, raw, text, source, 1024, 128)
            write_text_rows(results, text, measure_text(runtime.logprobs, None, windows, text)[0])
    whole = Evaluated(results, raw, settings)
    report = serve("base", "vllm", llama, whole, tmp_path / "log")
    assert report.state == "served", report.reason
    # an evaluation of another model is noticed: its records say that every token is a little less likely
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in results.iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "nll": row["nll"] + 0.02 * row["tokens"]} if "nll" in row else row for row in rows]
        (changed / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = serve("other", "vllm", llama, replace(whole, results=changed), tmp_path / "log")
    assert report.state == "not served"
    assert "the mean log-probability" in (report.reason or "")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("MODELPRESS_VLLM_PYTHON"), reason="MODELPRESS_VLLM_PYTHON names no interpreter with vLLM"
)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_a_mixture_of_experts_is_served_or_needs_another_machine(scheme: str, corpus: Corpus, tmp_path: Path) -> None:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    model = tiny_model(tmp_path / "model", family="qwen3_moe", hidden=128, changes=experts)
    (tmp_path / "out").mkdir()
    values = {"scheme": scheme, "rounding": "nearest", **({"group_size": 32} if scheme == "W4A16" else {})}
    Pressing.create(model, corpus, tmp_path / "work").press(values, tmp_path / "out")
    link_or_copy(model / "tokenizer.json", tmp_path / "out/tokenizer.json")
    link_or_copy(model / "tokenizer_config.json", tmp_path / "out/tokenizer_config.json")
    try:
        with engines.served("vllm", tmp_path / "out", "experts", "auto", tmp_path / "log", context=128):
            pass
    except NotServableHere as error:
        assert re.search(r"only on processors with AMX \(.*MoE backend", str(error))  # noqa: PT017


@pytest.mark.parametrize(("node", "expected"), [("MatMulNBits", INTEGER_KERNELS), ("MatMul", "float32")])
def test_what_onnx_runtime_computes_in(tmp_path: Path, node: str, expected: str) -> None:
    made = onnx.helper.make_node(node, ["a", "b"], ["c"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([made], "g", [], [])), tmp_path / "model.onnx")
    assert engines.OnnxServer().computes_in(tmp_path, "auto") == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("Q4_1", "rounded activations"), ("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")],
)
def test_what_llama_cpp_computes_in(tmp_path: Path, kind: str, expected: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    plain = np.ones((2, 64), np.float32)
    writer.add_tensor("norm", plain)
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("weight", gguf.quants.quantize(plain, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert engines.LlamaCpp().computes_in(tmp_path, "auto") == expected


@pytest.mark.parametrize(("share", "expected"), [("1", 1), ("7", 7), ("", cpu_cores()), ("4,2", cpu_cores())])
def test_a_server_computes_in_the_threads_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, expected: int
) -> None:
    """Two llama.cpp servers with two threads each on two cores need seconds for a token."""
    monkeypatch.setenv("OMP_NUM_THREADS", share)
    words = engines.LlamaCpp().arguments(tmp_path, "a", "auto", 512)
    assert words[words.index("--threads") + 1] == str(expected)
    assert engines.OnnxServer().environment(tmp_path, 512)["OMP_NUM_THREADS"] == share
    assert read_options([str(tmp_path)]).threads == expected
    assert read_options([str(tmp_path), "--threads", "3"]).threads == 3


@pytest.mark.parametrize(("below", "near"), [(0.3, True), (2.0, False)])
def test_a_served_token_that_the_evaluation_did_not_record_may_be_a_near_tie_for_the_server(
    below: float, near: bool
) -> None:
    expected = Completion("a", [1], [5, 6], "b c", [[5, 8], [6, 9]], [[-0.1, -3.0], [-0.5, -0.9]])
    best = [[("token_id:5", -0.1)], [("token_id:7", -0.6), ("token_id:6", -0.6 - below)]]
    answer = Answer("b d", "stop", [5, 7], best=best)
    found = compared(expected, answer, Model().tokenizer, 1.0)
    assert found
    assert (found.place, found.near_tie) == (1, near)
