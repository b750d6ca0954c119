"""AutoAWQ's GEMM format, dequantized exactly: transformers alone refuses it without a GPU library.

Layout (AutoAWQ, awq/modules/linear/gemm.py): `qweight` int32 [in, out / 8], eight 4-bit columns in a word in the
order 0 2 4 6 1 3 5 7; `qzeros` int32 [in / group, out / 8], packed alike; `scales` float16 [in / group, out].
weight[out, in] = (q - zero) * scale.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tasks.errors import TaskError

_BITS = 4
# where the columns 0..7 stand in a word, lowest four bits first
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def unpack(packed: Tensor) -> Tensor:
    """int32 [rows, columns / 8] -> uint8 [rows, columns], the columns in their own order."""
    words = packed[:, :, None] >> (_PLACES.to(packed.device) * _BITS)
    return (words & (2**_BITS - 1)).to(torch.uint8).flatten(1)


def pack(values: Tensor) -> Tensor:
    """uint8 [rows, columns] -> int32 [rows, columns / 8]: what `unpack` takes apart."""
    columns = values.reshape(len(values), -1, len(_PLACES)).to(torch.int64)
    word = (columns << (_PLACES.to(values.device) * _BITS)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that the packed tensors stand for, in `dtype`."""
    group = qweight.shape[0] // scales.shape[0]
    values = unpack(qweight).to(torch.int16).view(scales.shape[0], group, -1)
    zeros = unpack(qzeros).to(torch.int16)[:, None]
    weight = (values - zeros).to(dtype) * scales[:, None].to(dtype)
    return weight.flatten(0, 1).T.contiguous()


def load_awq(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A dense model with the dequantized weights of an AutoAWQ directory; TaskError if it is of another kind."""
    config = AutoConfig.from_pretrained(directory)
    found = config.quantization_config
    if found.get("bits") != _BITS or str(found.get("version", "gemm")).lower() != "gemm":
        raise TaskError(
            f"{directory} is AWQ with bits={found.get('bits')}, version={found.get('version')}; "
            "4 bits in GEMM layout can be loaded; quantize it again so"
        )
    del config.quantization_config
    packed: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        packed |= load_file(file)
    dense = {}
    for name, tensor in packed.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight":
            dense[f"{stem}.weight"] = dequantize(tensor, packed[f"{stem}.qzeros"], packed[f"{stem}.scales"], dtype)
        elif kind not in ("qzeros", "scales"):
            dense[name] = tensor.to(dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(dense, strict=False)
    # the output layer may share the embedding's weights and then has none of its own
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise TaskError(
            f"{directory} does not fit its config.json: missing {sorted(set(missing) - tied)[:3]}, "
            f"unexpected {sorted(unexpected)[:3]}; make it again: modelpress run"
        )
    model.tie_weights()
    return model
