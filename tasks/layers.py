"""What pressing did to each layer: the error that it adds, and the bits that a weight takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open


def layer_errors(model: Path, pressed: Path, tokens: Any) -> dict[str, float]:
    """Relative error of what each decoder layer adds to its input, when it gets the baseline's own input.

    tokens: int64 [sequences, length]. The error of layer f pressed to g is |g(x) - f(x)| / |f(x) - x|, over all tokens:
    no layer is blamed for the ones before it, and methods that rescale inside a layer compare with those that do not.
    """
    import torch

    from tasks.runtimes.transformers import TransformersRuntime

    base = TransformersRuntime(model, "float32").model
    other = TransformersRuntime(pressed, "float32").model
    sums: dict[str, list[float]] = {}
    handles = []
    for index, (layer, twin) in enumerate(zip(base.base_model.layers, other.base_model.layers, strict=True)):
        name = f"layers.{index}"
        sums[name] = [0.0, 0.0]

        def compare(_: Any, args: Any, kwargs: Any, output: Any, twin: Any = twin, name: str = name) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            ours, theirs = _first(output), _first(twin(*args, **kwargs))
            sums[name][0] += (theirs - ours).double().pow(2).sum().item()
            sums[name][1] += (ours - hidden).double().pow(2).sum().item()

        handles.append(layer.register_forward_hook(compare, with_kwargs=True))
    with torch.inference_mode():
        for row in tokens:
            base.base_model(row[None].to(base.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: round((error / size) ** 0.5, 6) if size else 0.0 for name, (error, size) in sums.items()}


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def weight_bits(directory: Path) -> float:
    """Bits a weight of the decoder's linear layers takes on disk: scales, zero points and layers left alone counted."""
    bits, weights = 0, 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in names:
                stem, _, kind = name.rpartition(".")
                if ".layers." not in name or kind == "weight_shape":
                    continue
                tensor = tensors.get_slice(name)
                shape, size = tensor.get_shape(), 8 * _WIDTH[tensor.get_dtype()]
                count = 1
                for length in shape:
                    count *= length
                if len(shape) < 2:
                    continue
                bits += count * size
                if kind == "weight":
                    weights += count
                elif kind == "weight_packed":
                    rows, columns = tensors.get_tensor(f"{stem}.weight_shape").tolist()
                    weights += rows * columns
                elif kind == "qweight":
                    weights += count * 8
    return bits / weights


_WIDTH = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}
