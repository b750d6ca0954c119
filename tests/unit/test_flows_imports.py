"""Heavy libraries are imported only where they are used. `make lint` checks the direction of imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "llmcompressor", "compressed_tensors", "awq", "lm_eval", "datasets", "gguf"}


def test_the_flow_imports_no_model_library_indirectly() -> None:
    ours = "flows.optimize, flows.press, flows.doctor.examine, flows.cli"
    code = f"import {ours}, sys; sys.exit(', '.join({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


def test_the_command_line_does_not_import_slow_libraries() -> None:
    slow = {"prefect", "mlflow", "dvc"}
    code = f"import flows.cli, sys; sys.exit(', '.join({slow!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""
