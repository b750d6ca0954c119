"""`python -m bench`: quantize with every contender in turn, measure the results, and write bench/results/.

python -m bench --rounds 3 --only gptq --without "as published"
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.contenders import CONTENDERS, Contender
from bench.goals import DECODE, as_json, goals
from bench.picture import picture
from bench.table import rows, table
from tasks.reporting.provenance import git_state, machine, versions

RESULTS = Path("bench/results")
NEEDED = (Path("models/source"), Path("data/calibration"), Path("data/raw"))
STATISTICS = "statistics"
WIDTH = 150  # for logs; the table is unreadable when wrapped to 80 columns

Runs = dict[str, list[dict[str, Any]]]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Number of runs per contender.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Include only contenders whose name contains this.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Exclude contenders whose name contains this.")] = None,
    items: Annotated[int, typer.Option(min=1, help="Items per task, for the retention.")] = 100,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; default: all.")] = None,
) -> None:
    """Quantize with every contender in turn, and compare seconds, peak memory, perplexity and divergence."""
    missing = [str(path) for path in NEEDED if not path.is_dir()]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} is missing; make it first: dvc repro calibrate")
    chosen = [one for one in CONTENDERS if _wanted(one.name, only, without)]
    if not chosen:
        raise typer.BadParameter(f"no such contender; there are: {'; '.join(one.name for one in CONTENDERS)}")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory(prefix="modelpress-bench-") as folder:
        found = _measure(Path(folder), chosen, rounds, items)
    field = rows(found)
    told = goals(field, found["decode"]["ratio"])
    found |= {
        "goals": as_json(told),
        "items": items,
        "rounds": rounds,
        "machine": machine(),
        "versions": versions(),
        "git": git_state(),
        "threads": threads or machine()["cores"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (RESULTS / "latest.png").write_bytes(picture(field))
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(field))
    for goal in told:
        print(f"{'reached' if goal.reached else 'MISSED '}  {goal.what}: {goal.found} ({goal.promised})")
    print(f"\n{RESULTS / 'latest.json'} and latest.png")


def _wanted(name: str, only: list[str] | None, without: list[str] | None) -> bool:
    return (not only or any(part in name for part in only)) and not any(part in name for part in without or [])


def _measure(folder: Path, chosen: list[Contender], rounds: int, items: int) -> dict[str, Any]:
    """Run the contenders in turn, and measure the model of each one's last run."""
    runs: Runs = {}
    known = folder / STATISTICS
    for number in range(rounds):
        if any(one.own for one in chosen):
            runs.setdefault(STATISTICS, []).append(_run(f"round {number + 1}: {STATISTICS}", STATISTICS, known))
        for one in chosen:
            place = folder / one.name
            place.mkdir(exist_ok=True)
            for file in place.iterdir():
                file.unlink()
            runs.setdefault(one.name, []).append(_run(f"round {number + 1}: {one.name}", one.name, place, known))
    spoken = [one.name for one in chosen if one.name in DECODE]
    decode = _run("decoding in ONNX Runtime GenAI", "decode", known, *spoken) if spoken else {"ratio": {}}
    made = {one.name: folder / one.name for one in chosen} | {"base": Path("models/source")}
    quality = {name: _run(f"quality: {name}", "quality", place, str(items)) for name, place in made.items()}
    seconds = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    return {
        "seconds": seconds,
        "runs": runs,
        "peak_memory_bytes": {name: max(run["peak_memory_bytes"] for run in found) for name, found in runs.items()},
        "quality": quality,
        "decode": decode,
        "variants": {one.name: one.variant for one in chosen},
        "own": [one.name for one in chosen if one.own],
    }


def _run(title: str, what: str, *arguments: Path | str) -> dict[str, Any]:
    """Run bench.press and return the JSON that it prints."""
    print(title, flush=True)
    command = [sys.executable, "-m", "bench.press", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{title} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no error message'}"
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    typer.run(main)
