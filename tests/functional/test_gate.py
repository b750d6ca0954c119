"""The reference and the sequential gate, on lm-eval tasks with the tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tasks.errors import TaskError
from tasks.evaluate import evaluate, hand_on
from tasks.reference import measure_reference
from tasks.runtimes.transformers import TransformersRuntime
from tasks.scoring.evaluation import Job
from tasks.scoring.questions import Questions
from tasks.scoring.reference_states import output_layer
from tasks.settings import GateSettings, check_settings
from tests.functional.project import Checkout, params
from tests.tiny import Corpus

BASE, REFERENCE = Path("exports/transformers/base"), Path("data/reference/transformers")
GATE = GateSettings(sequential=True, four_bit=0.5, eight_bit=0.5, confidence=0.95, resamples=200)
LIMIT = 100


@pytest.fixture(scope="module")
def checkout(llama: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with data, base, a variant that differs a little, and the reference."""
    values = params(llama, corpus)
    values["evaluation"] |= {"limit": LIMIT}
    for name, source in values["evaluation"]["sources"].items():
        # repeat the questions to get enough items
        questions = tmp_path_factory.mktemp("questions") / f"{name}.jsonl"
        questions.write_text(Path(source["source"].removeprefix("path:")).read_text() * 8)
        source["source"] = f"path:{questions}"
    checkout = Checkout(tmp_path_factory.mktemp("gate") / "project", values)
    checkout.stage("datasets")
    for name in ("base", "near"):
        shutil.copytree(llama, checkout.root / "exports/transformers" / name)
    weights = checkout.root / "exports/transformers/near/model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    checkout.stage("reference", "transformers")
    return checkout


@pytest.fixture
def job(checkout: Checkout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """Evaluate the variant without cached scores."""
    monkeypatch.chdir(checkout.root)
    settings = check_settings(_values(checkout)).evaluation
    return Job(settings, "transformers", Path("exports/transformers/near"), scores=tmp_path / "scores")


def _values(checkout: Checkout) -> Any:
    import yaml

    return yaml.safe_load((checkout.root / "params.yaml").read_text())


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of items that the model scores in each unit."""
    counts: list[int] = []
    real: Callable[..., Any] = Questions.score

    def score(self: Questions, unit: Any) -> Any:
        counts.append(sum(map(len, unit.values())))
        return real(self, unit)

    monkeypatch.setattr(Questions, "score", score)
    return counts


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def test_a_clear_pass_and_a_clear_fail_stop_early(job: Job, scored: list[int], tmp_path: Path) -> None:
    planned = LIMIT * len(job.settings.tasks)
    for share in (0.4, 1.5):
        scored.clear()
        report = evaluate("near", job, BASE, REFERENCE, (GATE, share), tmp_path / "results")
        counts = [score.items for score in report.tasks.values()]
        # all tasks advance together
        assert len(set(counts)) == 1
        assert sum(counts) < planned
        assert set(report.contract["order"]["items"].values()) == {LIMIT}
        if share == 0.4:
            assert sum(scored) == sum(counts)
            passed = rows(tmp_path / "results")
    baseline = rows(REFERENCE)
    for task in job.settings.tasks:
        hashes = {row["item"]: row["hash"] for row in baseline[f"items-{task}"]}
        assert all(hashes[row["item"]] == row["hash"] for row in passed[f"items-{task}"])


def test_nothing_is_scored_twice_when_gate_or_limit_change(job: Job, scored: list[int], tmp_path: Path) -> None:
    tasks = len(job.settings.tasks)
    undecided = (GATE, 1.0)
    evaluate("near", job, BASE, REFERENCE, undecided, tmp_path / "first")
    assert sum(scored) == LIMIT * tasks
    # a different gate
    scored.clear()
    evaluate("near", job, BASE, REFERENCE, (GATE, 0.98), tmp_path / "second")
    assert scored == []
    # more items, also for the baseline; a limit inside a block does not change the block
    for limit, new in ((120, 50), (150, 0)):
        more = replace(job, settings=job.settings.model_copy(update={"limit": limit}))
        base = replace(more, model=BASE)
        measure_reference(base, tmp_path / "reference")
        scored.clear()
        evaluate("near", more, BASE, tmp_path / "reference", undecided, tmp_path / "third")
        assert sum(scored) == new * tasks
        # cached scores equal new ones
        cold = replace(more, scores=tmp_path / f"empty-{limit}")
        evaluate("near", cold, BASE, tmp_path / "reference", undecided, tmp_path / "cold")
        assert rows(tmp_path / "third") == rows(tmp_path / "cold")
        assert all(len(found) == limit for name, found in rows(tmp_path / "cold").items() if name.startswith("items"))


def test_damaged_scores_are_scored_again(job: Job, scored: list[int], tmp_path: Path) -> None:
    evaluate("near", job, BASE, REFERENCE, (GATE, 1.0), tmp_path / "first")
    files = sorted(job.scores.rglob("*.json"))
    files[0].write_text(files[0].read_text()[:-20])
    files[1].write_text(files[1].read_text().replace("0.0", "1.0", 1))
    assert len(files) == len(scored)
    scored.clear()
    evaluate("near", job, BASE, REFERENCE, (GATE, 1.0), tmp_path / "second")
    assert len(scored) == 2
    assert rows(tmp_path / "first") == rows(tmp_path / "second")


def test_without_the_sequential_gate_all_items_are_scored_as_lm_eval_does(job: Job, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate

    from tasks.scoring.eval_tasks import task_manager
    from tasks.scoring.lm_eval_adapter import RuntimeLM

    fixed = GATE.model_copy(update={"sequential": False})
    report = evaluate("near", job, BASE, REFERENCE, (fixed, 0.4), tmp_path / "results")
    found = simple_evaluate(
        model=RuntimeLM(TransformersRuntime(job.model, "float32"), job.settings.batch_tokens, 512),
        tasks=list(job.settings.tasks),
        num_fewshot=job.settings.shots,
        limit=LIMIT,
        bootstrap_iters=0,
        task_manager=task_manager(job.settings.tasks, Path("evals")),
    )
    ours = rows(tmp_path / "results")
    for task in job.settings.tasks:
        theirs = [{"item": s["doc_id"], "hash": s["doc_hash"], "score": s["acc_norm"]} for s in found["samples"][task]]
        assert ours[f"items-{task}"] == theirs
        assert report.tasks[task].score == found["results"][task]["acc_norm,none"]
        assert report.tasks[task].items == LIMIT


def test_the_references_states_give_the_divergence_of_the_whole_baseline(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate("near", job, BASE, None, None, tmp_path / "whole")

    def load_nothing(*_: object) -> None:
        raise AssertionError("the baseline was loaded")

    monkeypatch.setattr("tasks.evaluate.load_runtime", load_nothing)
    kept = evaluate("near", job, BASE, REFERENCE, (GATE, 0.4), tmp_path / "kept")
    for text, score in whole.texts.items():
        assert score.kl > 1e-4
        assert kept.texts[text].kl == pytest.approx(score.kl, abs=1e-5)
        assert kept.texts[text].top1 == pytest.approx(score.top1, abs=1e-5)
        assert kept.texts[text].perplexity == score.perplexity
    (states, *_) = load_file(REFERENCE / "states-news.safetensors").values()
    assert states.shape == (job.settings.window - 1, 64)
    assert str(states.dtype) == "torch.float32"


def test_a_model_that_scales_its_logits_keeps_no_states(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TransformersRuntime.logprobs
    monkeypatch.setattr(TransformersRuntime, "logprobs", lambda self, ids: (real(self, ids) / 2).log_softmax(-1))
    assert output_layer(BASE, "float32", "cpu") is not None
    measure_reference(replace(job, model=BASE), tmp_path / "reference")
    assert not list((tmp_path / "reference").glob("states-*"))
    # then the baseline itself must run
    report = evaluate("near", job, BASE, tmp_path / "reference", (GATE, 0.4), tmp_path / "results")
    assert all(score.kl > 0 for score in report.texts.values())


def test_base_hands_on_what_the_reference_measured_without_a_model_library(checkout: Checkout) -> None:
    program = "import sys, tasks.evaluate as e; sys.argv[1:] = ['transformers', 'base']; e.main(); "
    program += "print('torch' in sys.modules)"
    said = checkout.command(sys.executable, "-c", program)
    assert said.splitlines()[-1] == "False"
    report = json.loads((checkout.root / "metrics/evaluate/transformers/base.json").read_text())
    reference = json.loads((checkout.root / REFERENCE / "evaluation.json").read_text())
    assert {key: report[key] for key in reference} == reference
    assert report.keys() - reference.keys() == {"seconds", "peak_memory_bytes"}
    assert json.loads((checkout.root / "metrics/reference/transformers/base.json").read_text())["seconds"] > 0
    results = rows(checkout.root / "results/transformers/base")
    assert results == rows(checkout.root / REFERENCE)
    assert {len(found) for name, found in results.items() if name.startswith("items-")} == {LIMIT}
    assert len(results["texts"]) == 16


def test_another_contract_and_a_missing_reference_are_refused_before_anything_is_scored(
    job: Job, scored: list[int], tmp_path: Path
) -> None:
    other = replace(job, settings=job.settings.model_copy(update={"limit": 60}))
    with pytest.raises(TaskError, match=r"limit is 100 for base, 60 for near.* dvc repro -f reference@transformers"):
        evaluate("near", other, BASE, REFERENCE, (GATE, 0.4), tmp_path / "results")
    with pytest.raises(TaskError, match="dvc repro reference"):
        hand_on(tmp_path / "nothing", tmp_path / "results")
    assert scored == []
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("where", ["mlp.down_proj", "mlp.up_proj"])
def test_a_model_that_float16_cannot_hold_is_refused_if_it_ships_in_float16(
    where: str, job: Job, tmp_path: Path
) -> None:
    """The numbers are what a product of two layers gives to the next one, or what one layer returns."""
    model = shutil.copytree(BASE, tmp_path / "large")
    weights = load_file(model / "model.safetensors")
    factors = {"up_proj": 1e6, "down_proj": 1e-6}
    if where == "mlp.down_proj":
        factors = {"up_proj": 1e3, "gate_proj": 1e3, "down_proj": 1e-6}
    for name, factor in factors.items():
        weights[f"model.layers.1.mlp.{name}.weight"] *= factor
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    large = replace(job, model=model)
    for shipped in ("bfloat16", "float16"):
        (model / "config.json").write_text(json.dumps(config | {"dtype": shipped}))
        if shipped == "bfloat16":
            evaluate("large", large, BASE, REFERENCE, (GATE, 0.4), tmp_path / "results")
        else:
            with pytest.raises(TaskError, match=rf"large ships in float16.*layers\.1\.{where} computes numbers up to"):
                evaluate("large", large, BASE, REFERENCE, (GATE, 0.4), tmp_path / "none")
    assert not (tmp_path / "none").exists()
