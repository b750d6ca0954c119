"""Translation of settings and records from before variants had a scheme into the current keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.schemes import LLAMA_CPP, NONE

# the method of an old variant: the equivalent axes
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
_GONE = ("method", "bits", "symmetric", "type", "importance")  # now part of the scheme, or renamed below
_DEFAULTS = {"backend": "modelpress", "format": "compressed-tensors", "act_order": "static", "propagate": False}
# the precision that an export rounded the output layer to, by target and bits
_OUTPUT = {("onnx", 8): "W8A16@64", ("onnx", 4): "W4A16_ASYM@32", ("gguf", 8): "W8A16@32"}
_MIXTURES = {4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K"}  # of llama.cpp, by the bits of most weights
# keys of current records that old ones lack, except the scheme
_UNTOLD = {"recipe": "", "format": "", "backend": "", "output_layer": None, "output_layer_error": None}


def new_words(values: Mapping[str, Any]) -> list[str]:
    """A line with the replacement for each part of params.yaml in the old form; empty if there is none."""
    lines = []
    variants = values.get("variants")
    output_layer = _output_layer(values)
    for name, variant in (variants if isinstance(variants, Mapping) else {}).items():
        if isinstance(variant, Mapping) and "method" in variant:
            lines.append(f"variants.{name}: {_flow(_with_output_layer(new_variant(variant), output_layer))}")
    for section in ("onnx", "gguf"):
        if section in values:
            lines.append(
                f"{section}: remove the section; output_layer is now a setting of each variant with the backend "
                "modelpress, and so is embedding where the model does not tie the two"
            )
    if "target" in values:
        lines.append(f"targets: [{values['target']}]    # instead of target")
    return lines


def _output_layer(values: Mapping[str, Any]) -> str | None:
    """The precision set in the target's section; None: not quantized."""
    target = str(values.get("target"))
    section = values.get(target)
    bits = section.get("output_layer") if isinstance(section, Mapping) else None
    return _OUTPUT.get((target, bits)) if isinstance(bits, int) else None


def _with_output_layer(new: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """The new variant with the output layer's precision, in a format that supports it."""
    if precision is None or new["scheme"] in (NONE, *LLAMA_CPP) or "backend" in new:
        return new
    if new.pop("format", None) is not None:
        new["scale_dtype"] = "float16"  # as in these formats
    return new | {"output_layer": precision}


def new_variant(old: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a variant's settings; keys that no earlier version had are kept.

    Also for an old variant in a record, where all values may be strings.
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
    """Translate a variant's record; a current record is returned unchanged.

    `old` is a file in metrics/quantize, a row of a report's summary, or a variant's MLflow parameters, all strings.
    Values missing from an old record are empty.
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
    """The scheme of an old record, from its bits where the settings are missing."""
    if old["method"] == "gguf" and "type" not in old:
        return _MIXTURES.get(old.get("bits", 0), "")
    if old["method"] == "gptq" and "symmetric" not in old:
        return "W4A16 or W4A16_ASYM"
    return str(new_variant(old)["scheme"])


def _precision(old: str) -> str:
    """Translate 4@64 to W4A16_ASYM@64; 8 bits were symmetric."""
    bits, _, size = old.partition("@")
    return f"{'W8A16' if bits == '8' else f'W{bits}A16_ASYM'}@{size}"


def _true(value: Any) -> bool:
    return str(value).lower() == "true"


def _flow(values: Mapping[str, Any]) -> str:
    """Format as one line of YAML."""
    return "{" + ", ".join(f"{key}: {_word(value)}" for key, value in values.items()) + "}"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_word(one) for one in value) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
