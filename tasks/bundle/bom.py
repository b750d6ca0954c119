"""The bundle's bill of materials: CycloneDX 1.6 with a model card (ML-BOM), https://cyclonedx.org/capabilities/mlbom.

The library has no class for model cards or data sets, so the document is written as JSON and checked against the schema
that the library carries. It has no time and no random serial number: equal bundles have equal bills.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.spdx import fixup_id, is_expression
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from tasks.errors import TaskError
from tasks.reporting.model_card import base_model

BOM = "bom.cdx.json"
_ROLES = {
    ("calibration", "sources"): "calibration text",
    ("evaluation", "sources"): "evaluation items",
    ("evaluation", "texts"): "held-out text",
}
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx.data")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PIN = re.compile(r"wheel:([A-Za-z0-9._-]+)==([^/]+)/")


def bill_of_materials(
    facts: Mapping[str, Any],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    task: str,
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """The bill of a bundle as a CycloneDX document.

    facts: what provenance.json holds. summary: of the report. config: config.json. task: in the hub's words. digests:
    sha256 by file. TaskError if the result is not valid.
    """
    row = summary["variants"][summary["winner"]]
    data, libraries = list(_data_sets(facts)), list(_libraries(facts["libraries"]))
    source = _source(facts["model"])
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": facts["parameters"]["package"]["name"],
        "version": facts["variant"]["identity"],
        "description": f"{source['name']}, quantized to {row['scheme']}",
        "licenses": source["licenses"],
        "pedigree": {
            "ancestors": [{key: source[key] for key in ("type", "name", "version", "licenses", "purl")}],
            "notes": row["recipe"],
        },
        "components": list(_weights(digests)),
        "modelCard": _model_card(facts, summary, config, task, [one["bom-ref"] for one in data]),
    }
    parts = [source, *data, *libraries]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "modelpress", "version": facts["git"]["commit"]}]},
            "component": model,
        },
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": [one["bom-ref"] for one in parts]}],
    }
    return _checked(_without_empty(document))


def _checked(document: dict[str, Any]) -> dict[str, Any]:
    """Add a serial number, which the contents determine. TaskError unless the schema holds."""
    text = json.dumps(document, sort_keys=True)
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, text)}"
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)):
        cause: Any = error.data
        raise TaskError(
            f"the bill of materials is not valid CycloneDX at {cause.json_path}: {cause.message[:200]}; "
            "report this as a bug of modelpress"
        )
    return document


def _model_card(
    facts: Mapping[str, Any],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    task: str,
    data: list[str],
) -> dict[str, Any]:
    row, variant = summary["variants"][summary["winner"]], facts["variant"]
    values = {k: variant[k] for k in ("scheme", "format", "backend", "bits_per_weight", "reproducible")}
    values |= {"contract_hash": facts["evaluation"]["contract_hash"]}
    return {
        "modelParameters": {
            "task": task,
            "architectureFamily": config.get("model_type"),
            "modelArchitecture": next(iter(config.get("architectures") or ()), None),
            "datasets": [{"ref": ref} for ref in data],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(row))},
        "considerations": {
            "technicalLimitations": [
                *summary["notes"],
                "The figures apply to these tasks and texts in this runtime. Other tasks may lose more.",
            ],
            "performanceTradeoffs": [f"Verdict: {row['verdict']}, {row['reason']}."],
        },
        "properties": _properties(values),
    }


def _metrics(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The results of the variant: retention and score by task, perplexity and divergence by text."""
    kept = row["retention"]
    yield _metric("retention", kept["mean"], "mean of the tasks", kept)
    for task, one in sorted(kept["tasks"].items()):
        yield _metric("retention", one["retention"], task, one)
        yield _metric("score", one["score"], task)
    for text, one in sorted(row["texts"].items()):
        yield _metric("perplexity", one["perplexity"], text)
        yield _metric("KL divergence from the baseline, nats per token", one["kl"], text)


def _metric(kind: str, value: float | None, part: str, interval: Mapping[str, Any] | None = None) -> dict[str, Any]:
    metric: dict[str, Any] = {"type": kind, "value": None if value is None else f"{value:.4f}", "slice": part}
    if interval:
        metric["confidenceInterval"] = {"lowerBound": f"{interval['low']:.4f}", "upperBound": f"{interval['high']:.4f}"}
    return metric


def _source(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": base_model(model["source"]),
        "version": model["revision"],
        "licenses": _licences(model["licence"]),
        "purl": _purl(model["source"], model["revision"]),
        "components": list(_weights({file: one["sha256"] for file, one in model["files"].items()}, "source/")),
        "properties": _properties({"source": model["source"]}),
    }


def _weights(digests: Mapping[str, str], folder: str = "") -> Iterator[dict[str, Any]]:
    """The files with weights; SHA256SUMS lists the others as well."""
    for file, digest in sorted(digests.items()):
        if file.endswith(WEIGHTS):
            hashes = [{"alg": "SHA-256", "content": digest}]
            yield {"type": "file", "bom-ref": f"file/{folder}{file}", "name": file, "hashes": hashes}


def _data_sets(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The data sets with their use, and the licence in params.yaml, because sources of data state none that is sure."""
    for (section, group), role in _ROLES.items():
        for name, settings in sorted(facts["parameters"][section][group].items()):
            if one := facts["data"].get(name):
                yield {
                    "type": "data",
                    "bom-ref": f"data/{name}",
                    "name": name,
                    "version": one.get("revision"),
                    "hashes": [{"alg": "SHA-256", "content": one["sha256"]}],
                    "licenses": _licences(settings["licence"]),
                    "purl": _purl(one["source"], one.get("revision")),
                    "data": [{"type": "dataset", "name": name, "description": role}],
                    "properties": _properties({"source": one["source"]}),
                }


def _libraries(versions: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
    """The libraries that made and measured the model, with the licences that their packages state."""
    for name, version in sorted(versions.items()):
        if version is not None:
            purl = str(PackageURL("pypi", name=name, version=version))
            yield {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": version,
                "licenses": _licences(_stated_licence(name, version)),
                "purl": purl,
            }


def _stated_licence(name: str, version: str) -> str | None:
    """The licence in an installed package's metadata; None if another version is installed."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if package.version != version:
        return None
    stated: Any = package.metadata
    text = str(stated.get("License-Expression") or stated.get("License") or "")
    classifiers = [one.rpartition(" :: ")[2] for one in stated.get_all("Classifier", []) if one.startswith("License")]
    return text if text and "\n" not in text else next(iter(classifiers), None)


def _licences(stated: str | None) -> list[dict[str, Any]]:
    """A licence by its SPDX identifier, as an expression of these, or else by the name that its owner gives it."""
    if not stated:
        return []
    if identifier := fixup_id(stated):
        return [{"license": {"id": identifier}}]
    return [{"expression": stated}] if is_expression(stated) else [{"license": {"name": stated}}]


def _purl(source: str, revision: str | None) -> str | None:
    """The package URL of a wheel, or of a repository at a commit; other sources have none."""
    if pinned := _PIN.match(source):
        return str(PackageURL("pypi", name=pinned[1], version=pinned[2]))
    if source.startswith("hf:") and _COMMIT.fullmatch(revision or ""):
        owner, _, name = source.removeprefix("hf:").partition("@")[0].rpartition("/")
        return str(PackageURL("huggingface", owner, name, revision))
    return None


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": f"modelpress:{key}", "value": str(value)} for key, value in values.items() if value is not None]


def _without_empty(value: Any) -> Any:
    """Remove keys without a value: the schema knows no null."""
    if isinstance(value, dict):
        return {k: kept for k, v in value.items() if (kept := _without_empty(v)) not in (None, [], {})}
    return [_without_empty(v) for v in value] if isinstance(value, list) else value
