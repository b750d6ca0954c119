"""The names of a model's tensors on disk and in memory, by Transformers' own conversions.

Transformers stores some models under other names than those of their modules, and some in other shapes: the experts of
a mixture, for example, are matrices on disk and one stack in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from tasks.errors import TaskError, first_line
from tasks.model.linears import Origins


class Names:
    """Where the tensors of a model directory belong in the model.

    target: by name on disk, the name in memory of the (first) tensor that it becomes. ties: by name in memory, the
    tensor whose weights it shares. strangers: names on disk that are none of the model's.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        mapping = get_model_conversion_mapping(model)
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._own = dict.fromkeys(model.state_dict(), True)
        self.ties: dict[str, str] = dict(model.all_tied_weights_keys or {})
        self.target: dict[str, str] = {}
        self._pattern: dict[str, str | None] = {}  # by name on disk, that of its conversion
        for name in stored:
            self.target[name], self._pattern[name] = self._rename(name)
        self.strangers = [name for name, found in self.target.items() if found not in self._own]

    def ignored(self, names: Iterable[str], missing: bool) -> list[str]:
        """Those of `names` that Transformers ignores for this model if they are missing, or too many, on disk."""
        kind = "missing" if missing else "unexpected"
        patterns = [re.compile(one) for one in getattr(self._model, f"_keys_to_ignore_on_load_{kind}") or ()]
        return [name for name in names if any(one.search(name) for one in patterns)]

    def stored(self, prefix: str) -> list[str]:
        """The names on disk of what the model has under `prefix`, shared weights included."""
        shared = {tied for name, tied in self.ties.items() if name.startswith(prefix)}
        return [name for name, found in self.target.items() if found.startswith(prefix) or found in shared]

    def plain(self, names: Iterable[str]) -> bool:
        """Whether these tensors are the same on disk and in memory, but for their names."""
        return all(self._pattern[name] is None for name in names)

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name on disk as the model has them, by name in memory; a conversion needs all that it reads."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, Tensor] = {}
        joined: dict[str, Any] = {}
        by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self.target[name], self._pattern[name]
            if pattern is None:
                found[target] = tensors[name]
            else:
                one = joined.setdefault(target, deepcopy(by_pattern[pattern]))
                one.add_tensor(target, name, pattern, tensors[name])
        for target, one in joined.items():
            try:
                made = one.convert(target, model=self._model, config=self._model.config)
            except (RuntimeError, ValueError, IndexError, KeyError) as error:
                raise TaskError(
                    f"the tensors on disk do not make {target}: {first_line(error)}; some are "
                    "missing or have another shape: fetch the model again"
                ) from error
            found |= {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return found

    def values(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """The values that tensors on disk give to `names` in memory, shared weights included; a name without one is
        left out."""
        found = self.convert(tensors)
        asked = {name: found.get(name, found.get(self.ties.get(name, name))) for name in names}
        return {name: tensor for name, tensor in asked.items() if tensor is not None}

    def nowhere(self, names: Iterable[str], values: Mapping[str, Tensor]) -> list[str]:
        """Those of `names` without a value that Transformers would miss as well."""
        missing = [name for name in names if name not in values]
        return sorted({*missing} - {*self.ignored(missing, missing=True)})

    def origins(self, shapes: Mapping[str, tuple[int, ...]], inside: str, prefix: str) -> Origins:
        """Which linear layers on disk the parameters under `inside` are made of. shapes: of the stored tensors that
        they are made of; prefix: left out of these names."""
        names = [name for name in self._own if name.startswith(inside)]
        made = []
        for numbered in Origins.numbered(shapes):
            found = self.values(numbered, names)
            made.append({name.removeprefix(inside): in_own_storage(tensor) for name, tensor in found.items()})
        return Origins({name.removeprefix(prefix): shape for name, shape in shapes.items()}, *made)

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        found = rename_source_key(name, self._renamings, self._converters, prefix, self._own)
        if found[0] not in self._own and name in self._own:
            found = rename_source_key(name, [], [], prefix, self._own)
        return found


def in_own_storage(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in a storage of its own: conversions may return several views of one."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
