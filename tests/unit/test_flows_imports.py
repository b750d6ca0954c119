"""What is loaded only where it is used. Which way imports go is checked by `make lint`, as pyproject.toml says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "llmcompressor", "compressed_tensors", "awq", "lm_eval", "datasets", "gguf"}


def test_the_flow_loads_no_model_library_by_way_of_others() -> None:
    ours = "flows.optimize, flows.press, flows.doctor.examine, flows.cli"
    code = f"import {ours}, sys; sys.exit(', '.join({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


def test_the_command_line_answers_without_the_libraries_that_take_seconds() -> None:
    slow = {"prefect", "mlflow", "dvc"}
    code = f"import flows.cli, sys; sys.exit(', '.join({slow!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""
