"""The evaluate stage: one model's quality, item by item, under the one contract that all models share.

python -m tasks.evaluate int8
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.errors import TaskError, TransientError
from tasks.hardware import peak_memory
from tasks.output import sha256, whole_directory, write_json, write_text
from tasks.program import one_argument, run_stage
from tasks.runtimes import Runtime, load_runtime
from tasks.scoring.divergence import TextScore, measure_text, text_windows
from tasks.scoring.eval_tasks import task_manager
from tasks.settings import BASE, EvaluationSettings, Settings
from tasks.text.bos import begins_with_bos

# The metric that an item's score is, where a task offers several; else the first that is better when higher.
METRICS = ("acc_norm", "acc", "exact_match", "f1")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True)
class TaskScore:
    """A task's mean score over its items, and what guessing would give (None where there are no options)."""

    metric: str
    score: float
    items: int
    chance: float | None


@dataclass(frozen=True)
class EvaluationReport:
    """metrics/evaluate/V.json. Seconds are of the measuring itself; memory is the process's peak, bytes."""

    variant: str
    contract: dict[str, Any]
    contract_hash: str
    tasks: dict[str, TaskScore]
    mean_score: float
    texts: dict[str, TextScore]
    seconds: float
    peak_memory_bytes: int


def evaluate(
    name: str,
    settings: EvaluationSettings,
    target: str,
    model: Path,
    baseline: Path,
    raw: Path,
    evals: Path,
    destination: Path,
) -> EvaluationReport:
    """Measure the model in the target's runtime and write its per-item results to `destination`.

    baseline: the model that divergence is measured from; the divergence of `base` itself is zero.
    TaskError if a task is unknown or its data cannot be read, or if a text is too short.
    """
    started = time.monotonic()
    runtime = load_runtime(target, model, settings.dtype)
    with whole_directory(destination) as work:
        samples, versions = _run_tasks(runtime, settings, model, evals)
        scores = {task: _write_items(work, task, found) for task, found in samples.items()}
        windows = {
            text: text_windows(runtime.tokenizer, raw, text, source, settings.text_tokens, settings.window)
            for text, source in settings.texts.items()
        }
        reference = None if name == BASE else load_runtime(target, baseline, settings.dtype)
        texts = {}
        for text, found in windows.items():
            rows, texts[text] = measure_text(runtime, reference, found, text)
            write_text(work / f"windows-{text}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    contract = _contract(settings, runtime, model, raw, versions)
    return EvaluationReport(
        variant=name,
        contract=contract,
        contract_hash=hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest(),
        tasks=scores,
        mean_score=sum(score.score for score in scores.values()) / len(scores),
        texts=texts,
        seconds=round(time.monotonic() - started, 1),
        peak_memory_bytes=peak_memory(runtime.info.device),
    )


def _run_tasks(
    runtime: Runtime, settings: EvaluationSettings, model: Path, evals: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """lm-eval's record of every item by task, and what defines each task."""
    with tempfile.TemporaryDirectory() as cache:
        # datasets caches by path and time; a cache of our own can hold nothing stale
        os.environ["HF_DATASETS_CACHE"] = cache
        import datasets
        import httpx
        from lm_eval import simple_evaluate

        from tasks.scoring.lm_eval_adapter import RuntimeLM

        datasets.disable_progress_bars()
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        try:
            results = simple_evaluate(
                model=RuntimeLM(runtime, settings.batch_tokens, config["max_position_embeddings"]),
                tasks=list(settings.tasks),
                num_fewshot=settings.shots,
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=settings.chat_template,
                task_manager=task_manager(settings.tasks, evals),
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        except (FileNotFoundError, ConnectionError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().partition("\n")[0]
            away = isinstance(error, ConnectionError | httpx.HTTPError)
            raise (TransientError if away else TaskError)(
                f"the data of {', '.join(settings.tasks)} cannot be read: {reason}; "
                "run the datasets stage, or check that the hub is reachable: modelpress doctor"
            ) from error
    assert results is not None  # only other ranks of a distributed run get none
    samples = {
        task: _one_score_each(task, found, results["higher_is_better"][task])
        for task, found in results["samples"].items()
    }
    definition = {
        task: {"version": results["versions"].get(task), "hash": _asked(found)} for task, found in samples.items()
    }
    return samples, definition


def _one_score_each(task: str, samples: list[dict[str, Any]], higher_is_better: Mapping[str, bool]) -> list[Any]:
    """Each item once, its score as "score" and the name of that score as "metric". TaskError if there is none."""
    if not samples:
        raise TaskError(f"task {task} has no items; check its data")
    # where a task reads an answer in several ways (its filters), lm-eval lists the item for each
    first = samples[0]["filter"]
    found = [sample for sample in samples if sample["filter"] == first]
    numbers = [name for name in found[0]["metrics"] if isinstance(found[0][name], int | float)]
    metric = next((m for m in (*METRICS, *numbers) if m in numbers and higher_is_better.get(m)), None)
    if metric is None:
        raise TaskError(
            f"task {task} gives its items no number that is better when higher (it has: "
            f"{', '.join(found[0]['metrics'])}); choose another task"
        )
    name = metric if first == "none" else f"{metric},{first}"
    return [{**sample, "score": float(sample[metric]), "metric": name} for sample in found]


def _asked(samples: list[dict[str, Any]]) -> str:
    """What was asked, down to the letter: sha256 over every item's document, prompt and target."""
    parts = (s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in sorted(samples, key=lambda s: s["doc_id"]))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _write_items(work: Path, task: str, samples: list[dict[str, Any]]) -> TaskScore:
    """Write items-TASK.jsonl and sum it up."""
    rows = sorted(
        ({"item": s["doc_id"], "hash": s["doc_hash"], "score": s["score"]} for s in samples),
        key=lambda r: r["item"],
    )
    write_text(work / f"items-{task}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    options = [len(s["arguments"]) for s in samples]
    chance = sum(1 / n for n in options) / len(options) if min(options) > 1 else None
    return TaskScore(samples[0]["metric"], sum(row["score"] for row in rows) / len(rows), len(rows), chance)


def _contract(
    settings: EvaluationSettings, runtime: Runtime, model: Path, raw: Path, definition: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that two evaluations must share to be compared."""
    libraries = (*runtime.libraries, "torch", "transformers", "lm-eval", "datasets")
    data = json.loads((raw / "sources.json").read_text(encoding="utf-8"))
    return {
        "tasks": dict(definition),
        "limit": settings.limit,
        "shots": settings.shots,
        "chat_template": settings.chat_template,
        "bos": begins_with_bos(runtime.tokenizer),
        "seed": settings.seed,
        "engine": runtime.info.name,
        "device": runtime.info.device,
        "dtype": runtime.info.dtype,
        "texts": {text: data[text]["sha256"] for text in settings.texts},
        "text_tokens": settings.text_tokens,
        "window": settings.window,
        "data": {name: data[name]["sha256"] for name in settings.sources},
        "tokenizer": {name: sha256(model / name) for name in TOKENIZER if (model / name).exists()},
        "libraries": {name: version(name) for name in libraries},
    }


def main() -> None:
    """Evaluate the variant that the command line names, in the current directory."""
    name = one_argument("python -m tasks.evaluate VARIANT")

    def work(settings: Settings) -> None:
        settings.variant(name)
        report = evaluate(
            name,
            settings.evaluation,
            settings.target,
            Path("exports") / name,
            Path("exports") / BASE,
            Path("data/raw"),
            Path("evals"),
            Path("results") / name,
        )
        write_json(Path(f"metrics/evaluate/{name}.json"), asdict(report))
        print(
            f"{name}: mean score {report.mean_score:.4f}, "
            + ", ".join(f"perplexity on {text} {score.perplexity:.3f}" for text, score in report.texts.items())
        )

    run_stage(work)


if __name__ == "__main__":
    main()
