"""The model card of a bundle. All its results come from the report's summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from tasks.companion_files import is_licence
from tasks.reporting.columns import interval_method
from tasks.reporting.engines import why_not_vllm
from tasks.reporting.kept import Kept
from tasks.reporting.labels import by_llama_cpp
from tasks.reporting.provenance import without_folders
from tasks.reporting.render import render
from tasks.reporting.served import engine, proof, ratios, under_load
from tasks.settings import Settings
from tasks.targets import files_of

# licence identifiers that the hub knows; any other licence is "other", with a license_name
HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "bigscience-openrail-m"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
)


def model_card(
    title: str,
    summary: Mapping[str, Any],
    settings: Settings,
    files: Iterable[str],
    quant_method: str,
    auto_class: str,
    own_reader: bool = False,
    kept: Kept | None = None,
) -> str:
    """README.md for the bundle of the winner of `summary`: YAML front matter for the hub, then Markdown.

    title: the bundle's name; files: its other files; quant_method: the format's name in its config.json; auto_class:
    the class of Transformers that loads it; own_reader: whether Transformers may not read the model as it was written
    (tasks/runtimes/dense.py); kept: of the source.
    """
    files = sorted(files)
    summary = without_folders(dict(summary))
    name = summary["winner"]
    row = summary["variants"][name]
    body = render(
        "model_card.md.j2",
        escape=False,
        title=title,
        summary=summary,
        name=name,
        row=row,
        base=summary["variants"][summary["baseline"]],
        base_model=base_model(summary["model"]["source"]),
        settings=without_folders(settings.model_dump(mode="json")),
        variant=_made_by(settings, name),
        outer="" if by_llama_cpp(row) else _outer(settings, name),
        licence_files=[f for f in files if is_licence(f)],
        quant_method=quant_method,
        why_not_vllm=why_not_vllm(name, settings.variant(name)),
        own_reader=own_reader and quant_method == "compressed-tensors",
        stacks="places.json" in files,
        kept=kept,
        served=row.get("serving") or {},
        load=row.get("load"),
        engine=engine,
        proof=proof,
        under_load=under_load,
        ratios=ratios,
        auto_class=auto_class,
        intervals=interval_method(summary["gate"]),
        chat_template="chat_template.jinja" in files,
    )
    front = yaml.safe_dump(
        _front_matter(summary, settings, quant_method, auto_class), sort_keys=False, allow_unicode=True
    )
    return f"---\n{front}---\n\n{body}"


def base_model(source: str) -> str:
    """The model name in a source: hf:org/name@main -> org/name; wheel:.../Model.Q4_1.gguf -> Model.Q4_1."""
    kind, _, rest = source.partition(":")
    if kind == "hf":
        return rest.partition("@")[0]
    return re.sub(r"\.gguf$", "", rest.rstrip("/").rpartition("/")[2])


def pipeline_task(auto_class: str) -> str:
    """The model's task in the hub's words, by the class of Transformers that loads it."""
    return "image-text-to-text" if "Image" in auto_class else "text-generation"


def _made_by(settings: Settings, name: str) -> dict[str, Any]:
    """The variant's settings in params.yaml, plus the defaults of a few axes that readers want to know."""
    variant = settings.variant(name)
    told = variant.model_fields_set | {"rounding", "backend", "format"}
    values = variant.model_dump(mode="json")
    return {key: value for key, value in values.items() if key in told and value not in (None, [])}


def _outer(settings: Settings, name: str) -> str:
    """The end of a sentence, about the output layer and the embedding."""
    variant = settings.variant(name)
    precisions = {"output layer": variant.output_layer, "embedding": variant.embedding}
    rounded = [f"the {what} is rounded to {precision}" for what, precision in precisions.items() if precision]
    return f"; {' and '.join(rounded) or 'the output layer and the embedding are not quantized'}"


def _front_matter(summary: Mapping[str, Any], settings: Settings, quant_method: str, auto_class: str) -> dict[str, Any]:
    """The metadata block for the hub."""
    model, name = summary["model"], summary["winner"]
    row = summary["variants"][name]
    licence = model["licence"]
    identifier = (licence or "").lower()
    front: dict[str, Any] = {"license": identifier if identifier in HUB_LICENCES else "other"}
    if front["license"] == "other":
        front["license_name"] = licence or "unknown"
    front |= {
        "base_model": base_model(model["source"]),
        "base_model_relation": "quantized",
        "library_name": files_of(summary["target"]),
        "pipeline_tag": pipeline_task(auto_class),
        "tags": ["quantized", row["scheme"], f"{row['bits']}-bit", quant_method, "modelpress"],
        "quantization": {
            **{k: v for k, v in _made_by(settings, name).items() if k not in ("samples", "skip_layers")},
            "bits": row["bits"],
            "bits_per_weight": round(row["bits_per_weight"], 3),
            "format": quant_method,
        },
    }
    return front
