"""Whether a model, run layer by layer, gives what the whole model gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.errors import TaskError
from tasks.model.decoder import Decoder
from tasks.model.skeleton import model_class

LARGE = 250_000_000  # parameters: above that, the model as a whole would take more memory than the pass
FOR_A_PARAMETER = 6  # bytes: float32, and what is read of the files
FAR = 1e-2  # nats; rounding in float32 moves log-probabilities by about 1e-5, a wrong mask or position by 0.01 to 10


def check_streamed(decoder: Decoder, directory: Path, tokens: Tensor, first: Tensor, last: Tensor) -> None:
    """TaskError unless the logits for `tokens`, int64 [1, length], are those of the model in `directory`, loaded as a
    whole, and a token's logits do not depend on later tokens. first, last: what the first and the last layer of
    `decoder` make of the tokens. A model of more than `LARGE` parameters is loaded with its first layer alone."""
    config: Any = decoder.model.config
    large = _parameters(decoder) > LARGE
    with torch.no_grad(), decoder.head() as head:
        streamed = head(first if large else last).log_softmax(-1)
    try:
        logits, other = _logits(directory, _cut(config) if large else config, decoder, tokens)
    except Exception as error:
        if not large:
            raise
        print(f"one layer alone of the {config.model_type} model does not load ({error}), so it is not compared")
        return
    far = (streamed - logits.log_softmax(-1)).abs().amax().item()
    if not far <= FAR:  # also if it is not a number
        raise TaskError(
            f"run layer by layer, the {config.model_type} model gives other log-probabilities (by {far:.2g} nats) than "
            "as a whole; its layers cannot be pressed one by one"
        )
    seen = (logits - other)[:, :-1].abs().amax().item()
    if not seen <= FAR:
        raise TaskError(
            f"in the {config.model_type} model a token sees later ones (its logits change by {seen:.2g}), so it is no "
            "decoder; if it is to be one, set is_decoder to true in its config.json"
        )


def checking_bytes(decoder: Decoder) -> int:
    """The memory, bytes, that `check_streamed` takes for a moment."""
    loaded = _parameters(decoder)
    if loaded > LARGE:
        inside = [sum(one.numel() for one in decoder.parameters(index).values()) for index in range(len(decoder))]
        loaded = loaded - sum(inside) + inside[0]
    return FOR_A_PARAMETER * loaded


def _parameters(decoder: Decoder) -> int:
    return sum(parameter.numel() for parameter in decoder.model.parameters())


def _logits(directory: Path, config: Any, decoder: Decoder, tokens: Tensor) -> list[Tensor]:
    """The logits for the tokens, and for the tokens with another one at the end, by Transformers' own loader."""
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    model: Any = model_class(config).from_pretrained(directory, config=config, **options)
    model = model.to(decoder.device).eval()
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % decoder.config.vocab_size
    with torch.no_grad():
        both = [model(input_ids=ids.to(decoder.device), use_cache=False).logits for ids in (tokens, changed)]
    return [logits.float() for logits in both]


def _cut(config: Any) -> Any:
    """The configuration with the first layer alone."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, key, value[:1])
    text.num_hidden_layers = 1
    return cut
