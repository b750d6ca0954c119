"""Whether a model, run layer by layer, gives what the whole model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.errors import TaskError
from tasks.hardware import available_memory
from tasks.model.decoder import Decoder
from tasks.model.skeleton import model_class

FAR = 1e-2  # nats; rounding in float32 moves log-probabilities by about 1e-5, a wrong mask or position by 0.01 to 10


def check_streamed(decoder: Decoder, directory: Path, tokens: Tensor, hidden: Tensor) -> None:
    """TaskError unless the logits for `tokens`, int64 [1, length], are those of the model in `directory`, loaded as a
    whole, and a token's logits do not depend on later tokens. hidden: what the last layer of `decoder` makes of the
    tokens. A model that does not fit in memory is not checked, and a line says so."""
    kind = decoder.model.config.model_type
    needed = 4 * sum(parameter.numel() for parameter in decoder.model.parameters())
    if needed > 0.7 * available_memory():
        print(f"the {kind} model takes {needed / 1e9:.0f} GB as a whole, so its layers are not compared with it")
        return
    whole: Any = model_class(decoder.model.config).from_pretrained(
        directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    whole = whole.to(decoder.device).eval()
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % decoder.config.vocab_size
    with torch.no_grad(), decoder.head() as head:
        streamed = head(hidden).log_softmax(-1)
        logits, other = (whole(input_ids=ids.to(decoder.device), use_cache=False).logits for ids in (tokens, changed))
    far = (streamed - logits.float().log_softmax(-1)).abs().amax().item()
    if not far <= FAR:  # also if it is not a number
        raise TaskError(
            f"run layer by layer, the {kind} model gives other log-probabilities (by {far:.2g} nats) than as a whole; "
            "its layers cannot be pressed one by one"
        )
    seen = (logits - other)[:, :-1].abs().amax().item()
    if not seen <= FAR:
        raise TaskError(
            f"in the {kind} model a token sees later ones (its logits change by {seen:.2g}), so it is no decoder; if "
            "it is to be one, set is_decoder to true in its config.json"
        )
