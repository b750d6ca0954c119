"""A model without its weights: its modules, the buffers that no file holds, and the decoder's layers.

Nothing here names a family. The buffers (rotary tables, position tables, masks) are made by the model's own code, as
`from_pretrained` does it; the layers are the module list of the class that Transformers itself names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from tasks.errors import TaskError, first_line

EAGER = "eager"  # a loop over the experts, each reading only the tokens that are routed to it


def model_class(config: Any) -> Any:
    """The class that `config` names where Transformers has it, with a vision tower or without; else the decoder
    language model of its type."""
    import transformers
    from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and issubclass(kind, GenerationMixin):
            return kind
    return AutoModelForCausalLM._model_mapping[type(config)]


def skeleton(config: Any, dtype: torch.dtype, device: str) -> Any:
    """The model of a Transformers configuration: parameters on the meta device, buffers that no file holds on `device`
    with their values. No parameter requires a gradient. TaskError if Transformers cannot build it."""
    try:
        return _skeleton(model_class(config), config, dtype, device)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise TaskError(
            f"Transformers cannot build the {config.model_type} model that config.json describes: "
            f"{type(error).__name__}: {first_line(error)}; fetch the model again, or correct its config.json"
        ) from error


def _skeleton(kind: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    from transformers.modeling_utils import _load_parameter_into_model

    config._experts_implementation = EAGER
    with ExitStack() as stack:
        for context in kind.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model: Any = kind(config)
    model.eval().requires_grad_(False)
    model.tie_weights()
    for name, buffer in list(model.named_non_persistent_buffers()):
        _load_parameter_into_model(model, name, torch.empty_like(buffer, device="cpu"))
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # `initialize_weights` fills all else
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    for name, buffer in list(model.named_non_persistent_buffers()):
        _load_parameter_into_model(model, name, buffer.to(device))
    return model


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, a list of modules, and its name in the model. TaskError if no list stands out.

    Transformers says of each model whose outputs are its hidden states, and which modules are not to be split. Where
    that fits several lists, or none, those with `num_hidden_layers` layers through which text passes are asked.
    """
    from transformers import PreTrainedModel

    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one)}
    called = _called(model, lists)
    recorded: set[str | None] = set()
    unsplit: set[str | None] = set()
    for module in (one for one in model.modules() if isinstance(one, PreTrainedModel)):
        outputs = (getattr(module, "_can_record_outputs", None) or {}).get("hidden_states")
        for one in outputs if isinstance(outputs, list | tuple) else [outputs]:
            recorded.add(getattr(getattr(one, "target_class", one), "__name__", None))
        unsplit |= set(module._no_split_modules or ())
    for sized in (True, False):  # num_hidden_layers may be an encoder's, or count halves of layers
        for named in (recorded, unsplit, None):
            fit = [
                name
                for name in called
                if (named is None or all(type(layer).__name__ in named for layer in lists[name]))
                and (len(lists[name]) == depth or not sized)
            ]
            outer = [name for name in fit if not any(name.startswith(f"{other}.") for other in fit)]
            if len(outer) == 1 and (sized or named is not None or len(called) == 1):
                return outer[0], lists[outer[0]]
    found = ", ".join(f"{name} ({len(lists[name])})" for name in called) or "none"
    raise TaskError(
        f"no list of {depth or 'the'} decoder layers was found in the {model.config.model_type} model (lists of "
        f"modules through which text passes: {found}); its layers cannot be pressed one by one"
    )


def _called(model: Any, lists: dict[str, nn.ModuleList]) -> list[str]:
    """The lists of which a text calls a module, at least up to the first that needs weights."""
    seen: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        for name, layers in lists.items()
        for layer in layers
    ]
    ids = torch.ones(1, 4, dtype=torch.long)
    with replaced(model.get_input_embeddings(), partial(embedded, model)), suppress(Exception), torch.no_grad():
        model(input_ids=ids, use_cache=False)  # it stops where weights are missing
    for hook in hooks:
        hook.remove()
    return [name for name in lists if name in seen] or list(lists)


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call `forward` in place of the module for the duration of the body."""
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


def embedded(model: Any, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What the input embedding makes of token ids, with zeros for numbers."""
    return torch.zeros(*ids.shape, model.get_input_embeddings().weight.shape[-1], device=ids.device)


def ties_output(config: Any) -> bool:
    """Whether the output layer has the embedding's weights."""
    text = config.get_text_config()
    return bool(getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False)))


def tensor_at(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its name in the model."""
    owner, _, own = name.rpartition(".")
    return cast("torch.Tensor", getattr(model.get_submodule(owner), own))


def place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where the model has the parameter or buffer `name`."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[own] = tensor
