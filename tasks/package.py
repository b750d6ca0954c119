"""The package stage: bundle the smallest variant that passes, after a trial load in its runtime.

python -m tasks.package onnx
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.bundle.bom import BOM, bill_of_materials
from tasks.bundle.checksums import SIGNATURE, SUMS, write_sums
from tasks.bundle.signing import sign
from tasks.checks.smoke import PROMPT, generates
from tasks.companion_files import companion_files
from tasks.deployment.write import write_serving
from tasks.errors import TaskError
from tasks.output import MANIFEST, checksums, link_or_copy, whole_directory, write_json, write_text
from tasks.program import arguments, run_stage
from tasks.reporting.kept import Kept, kept
from tasks.reporting.model_card import model_card, pipeline_task
from tasks.reporting.provenance import dvc_identity, git_state, without_folders
from tasks.reporting.records import read_json
from tasks.reporting.served import failed_to_serve
from tasks.reporting.summary import HOW
from tasks.settings import BUILTIN, Settings
from tasks.sources.choice import auto_class
from tasks.targets import files_of

CARD, PROVENANCE = "README.md", "provenance.json"
# files that describe their own folder, and would be wrong in the bundle
OF_THE_FOLDER = {MANIFEST, "source.json", CARD, PROVENANCE, BOM, SUMS, SIGNATURE}

Try = Callable[[Path, str, str], str]


@dataclass(frozen=True)
class Package:
    """The packaged variant, the bundle's size in bytes, and the text generated in the trial."""

    variant: str
    size_bytes: int
    text: str


@dataclass(frozen=True)
class Inputs:
    """The outputs of earlier stages for the bundle: folders, those of the target in `report` and `exports`, and the
    files `data` and `lock`."""

    report: Path
    exports: Path
    source: Path = Path("models/source")
    data: Path = Path("data/raw/sources.json")
    lock: Path = Path("dvc.lock")


def package(settings: Settings, target: str, inputs: Inputs, destination: Path, attempt: Try = generates) -> Package:
    """Build the bundle of the target's winner at `destination`, atomically.

    `attempt` (bundle, target, dtype -> text) must first load it and generate. TaskError, leaving `destination`
    unchanged, if no variant passes, if the export's bytes are not the evaluated ones, if the model does not fit the
    described hardware, or if it does not generate.
    """
    summary = read_json(inputs.report / "summary.json", "report")
    name = summary["winner"]
    if name is None:
        judged = {v: row for v, row in summary["variants"].items() if row["verdict"]}
        verdicts = "; ".join(f"{v}: {_told(row)}" for v, row in judged.items())
        raise TaskError(
            f"{target}: no variant passes its gate and is served, so nothing is packaged ({verdicts}). Change a "
            "variant's settings, add one, or evaluate more items"
        )
    export = inputs.exports / name
    evaluated = read_json(export / MANIFEST, f"export@{target}-{name}")["sha256"]
    with whole_directory(destination, seal=lambda folder: _seal(folder, settings)) as bundle:
        for file in sorted(evaluated.keys() - OF_THE_FOLDER):
            if not (export / file).is_file():
                raise TaskError(f"{export / file} is missing; rebuild it with: dvc repro -f export@{target}-{name}")
            link_or_copy(export / file, bundle / file)
        _same_bytes(export, evaluated, checksums(bundle), f"export@{target}-{name}")
        _complete(bundle, inputs.source)
        config = read_json(bundle / "config.json", f"export@{target}-{name}")
        files = [p.name for p in bundle.iterdir()]
        form = str(config.get("quantization_config", {}).get("quant_method", "none"))
        if files_of(target) != "transformers":
            form = target
        from tasks.runtimes.dense import needs_own_reader  # takes seconds to import

        own = form == "compressed-tensors" and needs_own_reader(bundle, form)
        same, kind = kept(bundle, inputs.source), auto_class(config)
        write_text(
            bundle / CARD, model_card(bundle_name(settings, target), summary, settings, files, form, kind, own, same)
        )
        facts = provenance(summary, settings, inputs, same)
        write_json(bundle / PROVENANCE, facts)
        write_json(bundle / BOM, bill_of_materials(facts, summary, config, pipeline_task(kind), evaluated))
        write_serving(bundle, settings, target, name)
        text = attempt(bundle, target, settings.evaluation.dtype)
    return Package(name, sum(p.stat().st_size for p in destination.rglob("*") if p.is_file()), text)


def _told(row: Mapping[str, Any]) -> str:
    """The verdict with its reason, and why a variant that passes was not served."""
    unserved = f", but not served: {row['serving']['reason']}" if failed_to_serve(row) else ""
    return f"{row['verdict']}, {row['reason']}{unserved}"


def bundle_name(settings: Settings, target: str) -> str:
    """The name of the folder of a target's bundle."""
    return f"{settings.package.name}-{target}"


def _reproducible(settings: Settings, name: str, device: str) -> str:
    """The reproducibility of the variant in words (tests/functional/test_quantizers.py)."""
    if settings.variant(name).backend == BUILTIN and device == "cpu":
        return "the same bytes, given the same inputs, libraries and kind of processor, with any number of threads"
    return "not promised: quantized by a library, or on a GPU"


def provenance(
    summary: Mapping[str, Any], settings: Settings, inputs: Inputs, same: Kept | None = None
) -> dict[str, Any]:
    """The winner's sources, revisions, checksums, parameters, commit, DVC identity, versions, seeds, machine, and what
    of its source the bundle keeps.

    Reproducible byte for byte: contains no time, no duration and no path of this machine.
    """
    name = summary["winner"]
    row = summary["variants"][name]
    source = read_json(inputs.source / "source.json", "download")
    facts = {
        "model": source,
        "data": read_json(inputs.data, "datasets"),
        "variant": {
            "name": name,
            **{k: row[k] for k in (*HOW, "bits_per_weight", "identity", "device")},
            "reproducible": _reproducible(settings, name, row["device"]),
        },
        "kept": same and same.facts(),
        "evaluation": {"contract": summary["contract"], "contract_hash": summary["contract_hash"]},
        "parameters": settings.model_dump(mode="json"),
        "seeds": {
            "calibration": settings.calibration.seed,
            "evaluation": settings.evaluation.seed,
            "bootstrap": summary["gate"]["seed"],
        },
        "git": git_state(),
        "dvc": dvc_identity(inputs.lock, summary["target"], list(settings.variants)),
        "libraries": summary["versions"],
        "machine": summary["machine"],
    }
    plain: dict[str, Any] = without_folders(facts)
    return plain


def _same_bytes(export: Path, evaluated: Mapping[str, str], linked: Mapping[str, str], stage: str) -> None:
    """TaskError unless the bundle's files are the evaluated ones."""
    other = [file for file, digest in linked.items() if evaluated[file] != digest]
    if other:
        raise TaskError(
            f"{', '.join(other)} of {export} changed since the export: these bytes were not evaluated; "
            f"rebuild them with: dvc repro -f {stage}"
        )


def _complete(bundle: Path, source: Path) -> None:
    """Add files missing from the export: tokenizer, processor, templates, licence."""
    for file in companion_files(p.name for p in source.iterdir()):
        if not (bundle / file).exists():
            link_or_copy(source / file, bundle / file)


def _seal(bundle: Path, settings: Settings) -> None:
    """Write SHA256SUMS last, so that its existence means that the bundle is complete, then sign all files."""
    write_sums(bundle)
    if settings.package.signing != "none":
        sign(bundle, settings.package.signing)


def main() -> None:
    """Run the stage in the current folder, for the target that the command line names."""
    (target,) = arguments("python -m tasks.package TARGET")

    def work(settings: Settings) -> None:
        settings.check_target(target)
        destination = Path("dist") / bundle_name(settings, target)
        done = package(settings, target, Inputs(Path("report") / target, Path("exports") / target), destination)
        print(f"{destination}: {done.variant}, {done.size_bytes:,} bytes; loaded in a fresh process, it wrote:")
        print(f"{PROMPT}{done.text}")

    run_stage(work)


if __name__ == "__main__":
    main()
