"""The download stage: the model as safetensors in one precision, with all files needed to load it.

python -m tasks.download
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from tasks.companion_files import is_licence
from tasks.errors import TaskError, first_line
from tasks.model import from_gguf
from tasks.model.announced import announced, write_announced
from tasks.model.arrival import INDEX, Arrival, check_finite, clean_config, inspect, read_json
from tasks.model.from_blocks import block_type, dequantize_blocks, full_names
from tasks.model.old_names import with_old_class, with_old_names
from tasks.model.tokenizer import check_rows, check_tokenizer
from tasks.output import checksums, link_or_copy, whole_directory, write_json, write_text
from tasks.program import run_stage
from tasks.settings import ModelSettings
from tasks.sources import Fetched, fetch_model
from tasks.sources.choice import check_config
from tasks.sources.files import require_space
from tasks.tensor_files import BYTES, DTYPES, convert, needs_conversion, read_header

SOURCE = "source.json"


@dataclass(frozen=True)
class SourceReport:
    """The contents of models/source, written to its source.json.

    `dequantized_from`: the original type of most weights, None for full precision; `grid`: the grid of that type.
    `pin`: the value for model.sha256 in params.yaml, None for a folder. `corrections`: what was changed in the model's
    files, in words (tasks/model/arrival.py). `files` excludes source.json.
    """

    source: str
    kind: str
    revision: str | None
    pin: str | None
    dequantized_from: str | None
    grid: from_gguf.Grid | None
    licence: str | None
    dtype: str
    parameters: int
    corrections: list[str]
    files: dict[str, dict[str, str | int]]


def download(settings: ModelSettings, destination: Path) -> SourceReport:
    """Fetch the model at `settings.source` and write it to `destination`.

    TaskError, leaving `destination` unchanged, if it cannot be fetched, does not match its checksum, is not a decoder
    language model in full precision or in a GGUF file, or if its files contradict each other: tensors and config.json,
    tokenizer and tokenizer.json.
    """
    with whole_directory(destination) as work:
        with tempfile.TemporaryDirectory(prefix=".scratch", dir=work) as scratch:
            fetched = fetch_model(settings.source, settings.sha256, lambda f: _check(f, settings), Path(scratch))
            if fetched.file is not None:
                # in a separate folder, so that no other file beside it is read
                alone = Path(scratch) / "alone" / settings.source.rpartition("/")[2]
                alone.parent.mkdir()
                alone.symlink_to(fetched.file.resolve())
                found = from_gguf.dequantize(alone, work, settings.dtype)
                _place(fetched.files, work, own=fetched.own)
                arrived = Arrival({}, None)
            else:
                arrived, found = _place_folder(fetched, work, settings.dtype, Path(scratch))
        corrections = arrived.corrections + _edit(work, settings.dtype, arrived.untied)
        check_finite(work)
        report = _finish(work, settings, fetched, found, corrections)
        write_json(work / SOURCE, asdict(report))
        for path in work.iterdir():
            # a file shared with DVC's cache is 0444 and must stay so
            if path.stat().st_mode & 0o777 != 0o444:
                path.chmod(0o644)
    return report


def _check(files: dict[str, Path], settings: ModelSettings) -> None:
    """Check a model folder by its small files."""
    if "config.json" not in files:
        raise TaskError(f"{settings.source} has no config.json, so it is not a transformers model")
    check_config(read_json(files["config.json"]), settings.source)


def _place_folder(fetched: Fetched, work: Path, dtype: str, scratch: Path) -> tuple[Arrival, from_gguf.Quantized]:
    """Write a model's files, with the weights that count in `dtype`; weights in FP8 or MXFP4 by blocks are
    dequantized."""
    weights = {n: p for n, p in fetched.files.items() if n.endswith(".safetensors")}
    index = read_json(fetched.files[INDEX]) if INDEX in fetched.files else None
    config = read_json(fetched.files["config.json"])
    kind = block_type(config.get("quantization_config") or {})
    files, own = dict(fetched.files), fetched.own
    if kind is not None:
        require_space(
            work, 4 * sum(path.stat().st_size for path in weights.values()), f"writing {kind} weights in full"
        )
        weights = dequantize_blocks(weights, config["quantization_config"], dtype, scratch)
        files, own = files | weights, False
        index = index and index | {"weight_map": full_names(index["weight_map"])}
    found = inspect(weights, index and index["weight_map"], config)
    wrong = {
        name
        for name, entries in found.files.items()
        if needs_conversion(weights[name], dtype) or entries != read_header(weights[name])
    }
    needed = {n: sum(e.count * BYTES[DTYPES[dtype]] for e in es.values()) for n, es in found.files.items()}
    extra = sum(b for n, b in needed.items() if n in wrong or own)
    require_space(work, extra, "writing the weights")
    left_out = wrong | (set(weights) - set(found.files))
    placed = {n: p for n, p in files.items() if n not in left_out}
    _place({n: p for n, p in placed.items() if n not in weights}, work, own=fetched.own)
    _place({n: p for n, p in placed.items() if n in weights}, work, own=own)
    for name in tqdm(sorted(wrong), desc=f"to {dtype}", unit="file", disable=not wrong):
        convert(weights[name], work / name, dtype, found.files[name])
    if index is not None:
        total = {"total_size": sum(needed.values())}
        write_json(work / INDEX, index | {"weight_map": found.index, "metadata": total})
    return found, from_gguf.Quantized(kind)


def _edit(work: Path, dtype: str, untied: bool) -> list[str]:
    """Set the dtype in the configurations, add the names of Transformers 4, and remove the origin and references to
    custom code; return what else was corrected."""
    corrections: list[str] = []
    for path in (work / "config.json", work / "tokenizer_config.json"):
        if not path.exists():
            continue
        values = read_json(path)
        for key in ("_name_or_path", "_model_name_or_path", "name_or_path", "is_local", "local_files_only", "auto_map"):
            values.pop(key, None)
        if path.name == "config.json":
            values, corrections = clean_config(values, untied)
            values = with_old_names(values | {"dtype": dtype})
        else:
            values = with_old_class(values)
        write_json(path, values)
    return corrections


def _place(files: dict[str, Path], work: Path, *, own: bool) -> None:
    for name, path in files.items():
        if own:
            # never link the user's files: DVC makes its cache read-only
            shutil.copyfile(path, work / name)
        else:
            link_or_copy(path, work / name)


def _finish(
    work: Path, settings: ModelSettings, fetched: Fetched, found: from_gguf.Quantized, corrections: list[str]
) -> SourceReport:
    """Add the files that every model folder needs, and write the report."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(work, trust_remote_code=False)
        corrections = corrections + check_tokenizer(work)
        tokenizer = AutoTokenizer.from_pretrained(work, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise TaskError(
            f"{settings.source}: transformers cannot load its configuration or tokenizer: {reason}"
        ) from error
    if isinstance(tokenizer.chat_template, str) and not (work / "chat_template.jinja").exists():
        write_text(work / "chat_template.jinja", tokenizer.chat_template)
    if not (work / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(work)
    licence = settings.licence or fetched.licence or found.licence
    if licence and not any(is_licence(p.name) for p in work.iterdir()):
        write_text(work / "LICENSE", f"SPDX-License-Identifier: {licence}\nSource: {settings.source}\n")
    write_announced(work)
    headers = [read_header(p) for p in sorted(work.glob("*.safetensors"))]
    embedding = f"{announced(work).embedding}.weight"
    for rows in (header[embedding].shape[0] for header in headers if embedding in header):
        check_rows(tokenizer, rows)
    return SourceReport(
        source=settings.source,
        kind=fetched.kind,
        revision=fetched.revision,
        pin=fetched.pin,
        dequantized_from=found.type,
        grid=found.grid,
        licence=licence,
        dtype=settings.dtype,
        parameters=sum(e.count for header in headers for e in header.values()),
        corrections=corrections,
        files={n: {"sha256": d, "bytes": (work / n).stat().st_size} for n, d in checksums(work).items()},
    )


def main() -> None:
    """Run the stage on ./params.yaml."""
    run_stage(lambda settings: download(settings.model, Path("models/source")))


if __name__ == "__main__":
    main()
