"""Refuse unknown tasks and settings that do not fit the model before any work starts.

python -m tasks.checks.preflight                  # before the download: of the model, only config.json is read
python -m tasks.checks.preflight models/source    # the downloaded model
python -m tasks.checks.preflight --elsewhere ...  # the stages run on other machines: this one's memory does not count
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tasks.bundle.signing import check_key
from tasks.checks.serving_memory import check_serving_memory
from tasks.errors import TransientError
from tasks.exporters import load_exporter
from tasks.model.arrival import clean_config, known_config, read_json
from tasks.model.compatibility import check_context, check_fit
from tasks.program import run_stage
from tasks.runtimes import check_room
from tasks.scoring.eval_tasks import check_tasks
from tasks.settings import Settings
from tasks.sources.choice import check_config
from tasks.sources.config import fetch_config
from tasks.targets import files_of

ELSEWHERE = "--elsewhere"


def check(settings: Settings, model: Path | None, evals: Path, here: bool = True) -> None:
    """TaskError for the first problem. `model` None: only config.json is known, and even that not of a GGUF file or
    while a hub is away. here: the stages run on this machine, so its memory counts."""
    check_tasks(settings.evaluation.tasks, evals)
    if here and settings.package.signing == "key":
        check_key()
    _check_exports(settings, model)
    if model is not None:
        check_model(settings, model, here)
        return
    try:
        config = fetch_config(settings.model.source)
    except TransientError:  # the stage download retries
        return
    if config is not None:
        with tempfile.TemporaryDirectory() as folder:
            check_announced(settings, config, Path(folder), here)


def check_model(settings: Settings, model: Path, here: bool = False) -> None:
    """TaskError if the settings do not fit the model in the directory, if no variant of it can fit package.hardware, or
    if its baseline cannot be evaluated `here`; its weights are not read."""
    check_context(settings, json.loads((model / "config.json").read_text(encoding="utf-8")))
    for name, variant in settings.variants.items():
        check_fit(name, variant, model)
    check_serving_memory(settings, model)
    if here and any(files_of(target) == "transformers" for target in settings.targets):
        check_room(model, settings.evaluation.dtype)


def _check_exports(settings: Settings, model: Path | None) -> None:
    for target in settings.targets:
        load_exporter(target).check(settings, model)


def check_announced(settings: Settings, config: Path, folder: Path, here: bool = False) -> None:
    """TaskError if the model that a config.json describes is not one that can be pressed, or if the settings do not fit
    it. folder: for a model without numbers."""
    values, _ = clean_config(read_json(config), untied=False)
    check_config(values, settings.model.source)
    check_context(settings, values)
    from tasks.model.hollow import hollow_model

    model = hollow_model(known_config(values), settings.model.dtype, folder / "model")
    _check_exports(settings, model)
    check_model(settings, model, here)


def main() -> None:
    """Check the project in the current directory."""
    given = [argument for argument in sys.argv[1:] if argument != ELSEWHERE]
    model = Path(given[0]) if given else None
    run_stage(lambda settings: check(settings, model, Path("evals"), here=ELSEWHERE not in sys.argv))


if __name__ == "__main__":
    main()
