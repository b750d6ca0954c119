"""llama.cpp's quantizer: a mixture of its types, chosen per layer, as by llama-quantize.

For a layer whose width is not a multiple of 256, llama.cpp uses blocks of 32 with more bits instead of K-quants.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

import gguf
import torch

from tasks.activations.inputs import read_inputs
from tasks.errors import TaskError
from tasks.formats.gguf.file import FAMILIES, NAME, write_gguf
from tasks.quantizers import QuantizeJob


def press_with_llama_cpp(job: QuantizeJob) -> None:
    """Write the model in its original precision, and quantize it with llama.cpp."""
    import llama_cpp

    from tasks.formats.gguf.llama_log import LOG

    variant = job.variant
    write_gguf(job.source, job.destination)
    whole = (job.destination / NAME).rename(job.destination / "whole.part")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant.scheme}")
    parameters.nthread = torch.get_num_threads()
    if variant.imatrix:
        parameters.imatrix = _importance(job)
    LOG.listen()
    status = llama_cpp.llama_model_quantize(
        str(whole).encode(), str(job.destination / NAME).encode(), ctypes.byref(parameters)
    )
    if status:
        raise TaskError(f"llama.cpp could not quantize {job.source} to {variant.scheme}: {LOG.said()}")
    whole.unlink()


def _importance(job: QuantizeJob) -> Any:
    """The mean square of each layer's inputs by llama.cpp's names, terminated by an empty entry."""
    import llama_cpp

    config = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(FAMILIES[config["model_type"]], layers)
    entries = []
    for index in range(layers):
        for linear, known in read_inputs(job.statistics, job.source, index, "cpu").items():
            own = names.get_name(f"model.layers.{index}.{linear}.weight", try_suffixes=(".weight",))
            values = (known.gram.diagonal() / job.tokens.numel()).tolist()
            data = (ctypes.c_float * len(values))(*values)
            entries.append(llama_cpp.llama_model_imatrix_data(str(own).encode(), data, len(values)))
    entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
    return (llama_cpp.llama_model_imatrix_data * len(entries))(*entries)
