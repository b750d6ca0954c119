"""Settings and records from before variants had a scheme: what each old key is called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.schemes import LLAMA_CPP, NONE

# a method's name in a variant: the axes that it stands for today
_METHODS: dict[str, dict[str, Any]] = {
    "none": {"scheme": "none"},
    "int8": {"scheme": "W8A8", "scaling": "smoothquant"},
    "gptq": {"scheme": "W4A16", "rounding": "gptq"},
    "awq": {"scheme": "W4A16_ASYM", "scaling": "awq"},
    "auto": {
        "scheme": "mixed",
        "scaling": "awq",
        "clip": True,
        "rounding": "gptq",
        "damping": 0.05,
        "scale_dtype": "float16",
    },
    "gguf": {},
}
_GONE = ("method", "bits", "symmetric", "type", "importance")  # part of the scheme, or renamed below
_DEFAULTS = {"backend": "modelpress", "format": "compressed-tensors", "act_order": "static", "propagate": False}
# what an export rounded the output layer to, by its target and the bits
_OUTPUT = {("onnx", 8): "W8A16@64", ("onnx", 4): "W4A16_ASYM@32", ("gguf", 8): "W8A16@32"}
_MIXTURES = {4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K"}  # llama.cpp's, by the bits of most weights
# what today's records hold beside the scheme, and old ones do not
_UNTOLD = {"recipe": "", "format": "", "backend": "", "output_layer": None, "output_layer_error": None}


def new_words(values: Mapping[str, Any]) -> list[str]:
    """A line for each part of params.yaml that is in old words, with the new ones; nothing where all are new."""
    lines = []
    variants = values.get("variants")
    output_layer = _output_layer(values)
    for name, variant in (variants if isinstance(variants, Mapping) else {}).items():
        if isinstance(variant, Mapping) and "method" in variant:
            lines.append(f"variants.{name}: {_flow(_with_output_layer(new_variant(variant), output_layer))}")
    for section in ("onnx", "gguf"):
        if section in values:
            lines.append(
                f"{section}: remove the section; its output_layer is a setting of each variant of the backend "
                "modelpress, and of a model that ties no embedding to it, embedding is another"
            )
    return lines


def _output_layer(values: Mapping[str, Any]) -> str | None:
    """The precision that the section of the target asked for; None: as it is."""
    target = str(values.get("target"))
    section = values.get(target)
    bits = section.get("output_layer") if isinstance(section, Mapping) else None
    return _OUTPUT.get((target, bits)) if isinstance(bits, int) else None


def _with_output_layer(new: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """The new variant with the output layer that the export rounded, in the format that can hold one."""
    if precision is None or new["scheme"] in (NONE, *LLAMA_CPP) or "backend" in new:
        return new
    if new.pop("format", None) is not None:
        new["scale_dtype"] = "float16"  # as these formats have it
    return new | {"output_layer": precision}


def new_variant(old: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's settings in new words; keys that no earlier version had stay as they are.

    Also of an old variant in a record, whose every value may be text.
    """
    method = str(old["method"])
    new = dict(_METHODS.get(method, {"scheme": method}))
    if method == "gguf":
        new = {"scheme": old.get("type")} | ({"imatrix": True} if _true(old.get("importance")) else {})
    if method == "gptq" and not _true(old.get("symmetric")):
        new["scheme"] = "W4A16_ASYM"
    for key, value in old.items():
        if key not in _GONE and (key not in _DEFAULTS or value != _DEFAULTS[key]):
            new[key] = value
    if method == "auto" and isinstance(old.get("candidates"), list):
        new["candidates"] = [_precision(str(one)) for one in old["candidates"]]
    if method == "awq" and old.get("rounding") == "nearest":
        del new["rounding"]
    return new


def new_record(old: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of a variant, in new words; a record without old ones as it is.

    Of a file in metrics/quantize, of a row of a report's summary, or MLflow's parameters of a variant, all text. What
    an old record does not tell is empty.
    """
    if "method" not in old:
        return dict(old)
    new = _UNTOLD | {"scheme": _scheme(old)} | {key: value for key, value in old.items() if key != "method"}
    if linears := old.get("linears"):
        new["linears"] = [
            {
                "name": one["name"],
                "chosen": _precision(one["chosen"]),
                "costs": {_precision(label): cost for label, cost in one["costs"].items()},
            }
            for one in linears
        ]
    return new


def _scheme(old: Mapping[str, Any]) -> str:
    """The scheme that an old record tells of; without the settings, its bits say the rest."""
    if old["method"] == "gguf" and "type" not in old:
        return _MIXTURES.get(old.get("bits", 0), "")
    if old["method"] == "gptq" and "symmetric" not in old:
        return "W4A16 or W4A16_ASYM"
    return str(new_variant(old)["scheme"])


def _precision(old: str) -> str:
    """4@64 -> W4A16_ASYM@64; 8 bits were symmetric."""
    bits, _, size = old.partition("@")
    return f"{'W8A16' if bits == '8' else f'W{bits}A16_ASYM'}@{size}"


def _true(value: Any) -> bool:
    return str(value).lower() == "true"


def _flow(values: Mapping[str, Any]) -> str:
    """As a line of YAML."""
    return "{" + ", ".join(f"{key}: {_word(value)}" for key, value in values.items()) + "}"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_word(one) for one in value) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
