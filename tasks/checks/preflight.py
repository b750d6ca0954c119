"""Refuse unknown tasks and settings that do not fit the downloaded model before any work starts.

python -m tasks.checks.preflight                  # only the settings
python -m tasks.checks.preflight models/source    # also whether the variants fit this model
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tasks.exporters import load_exporter
from tasks.model.compatibility import check_context, check_fit
from tasks.program import run_stage
from tasks.scoring.eval_tasks import check_tasks
from tasks.settings import Settings


def check(settings: Settings, model: Path | None, evals: Path) -> None:
    """TaskError for the first problem. `model` None: not downloaded yet."""
    check_tasks(settings.evaluation.tasks, evals)
    load_exporter(settings.target).check(settings, model)
    if model is not None:
        check_context(settings, json.loads((model / "config.json").read_text(encoding="utf-8")))
        for name, variant in settings.variants.items():
            check_fit(name, variant, model)


def main() -> None:
    """Check the project in the current directory."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    run_stage(lambda settings: check(settings, model, Path("evals")))


if __name__ == "__main__":
    main()
