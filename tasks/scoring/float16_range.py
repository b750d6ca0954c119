"""Whether a model that ships in float16 stays within its range, shown while it is measured in a wider type.

A model trained in bfloat16 may compute with numbers beyond float16's largest, 65504. Measured in float32 it looks fine,
and its user gets NaN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGEST = 65504.0


@contextmanager
def within_float16(runtime: Any, model: Path) -> Iterator[None]:
    """Watch what the decoder's modules read and return during the body.

    TaskError naming the module whose numbers exceed float16, if the directory `model` ships in float16. A runtime that
    does not compute with torch modules is not watched.
    """
    shipped = json.loads((model / "config.json").read_text(encoding="utf-8")).get("dtype")
    decoder: nn.Module | None = getattr(getattr(runtime, "model", None), "base_model", None)
    if shipped != "float16" or decoder is None:
        yield
        return
    most: dict[str, float] = {}

    def watch(name: str, given: Any, found: Any) -> None:
        for tensor in (*_tensors(given), *_tensors(found)):
            low, high = (end.item() for end in tensor.detach().aminmax())
            most[name] = max(most.get(name, 0.0), -low, high)

    hooks = [
        module.register_forward_hook(lambda _, given, found, name=name: watch(name, given, found))
        for name, module in decoder.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    beyond = next(((name, largest) for name, largest in most.items() if largest > LARGEST), None)
    if beyond:
        raise TaskError(
            f"{model.name} ships in float16, which ends at {LARGEST:.0f}, but its {beyond[0]} computes numbers up to "
            f"{beyond[1]:.3g}: its user would get NaN; set the variant's format to compressed-tensors and leave out "
            "scale_dtype, which keeps the model's dtype"
        )


def _tensors(found: Any) -> list[Tensor]:
    import torch

    parts = found if isinstance(found, tuple | list) else [found]
    return [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point() and part.numel()]
