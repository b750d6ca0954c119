"""Graph and weights of the target `onnx`, with the quantized weights bit for bit.

onnxruntime-genai's model builder makes the graph of the architecture in float32. The weight products are ours:
MatMulNBits for quantized layers, with any bits and group size, MatMul otherwise. Weights are read one at a time while
the file is written, so the whole model is never in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

# before the import: the wheels send usage data to Microsoft otherwise
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnx_ir
import torch
from onnxruntime_genai.models.builders import LlamaModel, MistralModel, Model, Qwen3Model, QwenModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.errors import TaskError
from tasks.formats.nbits import BYTE, Blocks, block_size, pack_blocks
from tasks.formats.stored import StoredModel
from tasks.output import write_json
from tasks.tensor_files import EMBEDDING, OUTPUT

GRAPH, WEIGHTS, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
# accuracy_level of MatMulNBits: float32 inputs, or inputs rounded to 8 bits per block for integer products
FLOATS, INTEGERS = 0, 4
UNQUANTIZED = 32

_BUILDERS = {"llama": LlamaModel, "mistral": MistralModel, "qwen2": QwenModel, "qwen3": Qwen3Model}
_FLOAT, _BYTES = onnx_ir.DataType.FLOAT, onnx_ir.DataType.UINT8
_DOMAIN = "com.microsoft"


def export_onnx(model: Path, destination: Path, accuracy_level: int = INTEGERS) -> None:
    """Write the graph of a quantized or unquantized model, its weights, genai_config.json and config.json.

    TaskError if tensors are missing.
    """
    config: Any = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the builder does not support our formats
    stored = StoredModel(model)
    make = type("Graph", (_Graph, _BUILDERS[config.model_type]), {})
    # the builder prints a line per layer
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        graph = make(config, stored, accuracy_level, cache)
        graph.make_model(str(model))
        graph.model.graph.sort()
        onnx_ir.save(graph.model, destination / GRAPH, external_data=WEIGHTS, size_threshold_bytes=0)
        graph.make_genai_config(config, {}, str(destination))
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))
    described.pop("quantization_config", None)
    write_json(destination / "config.json", described)


class _Graph(Model):
    """Mixin for the builder's class of an architecture that replaces its weight products."""

    def __init__(
        self,
        config: Any,
        stored: StoredModel,
        accuracy_level: int,
        cache: str,
    ) -> None:
        self.config = config
        self.stored = stored
        self.accuracy_level = accuracy_level
        self.tied = bool(config.tie_word_embeddings)
        self._names: dict[nn.Module, str] = {}
        self._kinds: dict[str, tuple[int, int]] = {}
        self._packed: tuple[list[str], Blocks] | None = None
        shared = self.tied and OUTPUT not in stored.quantized
        options = {"hf_token": False, "shared_embeddings": shared}
        super().__init__(config, _FLOAT, _FLOAT, "cpu", cache, options)

    def load_weights(self, input_path: str) -> nn.Module:
        """Load the model with its norms and biases; linear layers and the embedding have meta weights."""
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, trust_remote_code=False)
        self._names = {module: name for name, module in model.named_modules()}
        large = {f"{n}.weight" for m, n in self._names.items() if isinstance(m, nn.Linear | nn.Embedding)}
        small = {name: self.stored.tensor(name).float() for name in self.stored.dense if name not in large}
        missing, unexpected = model.load_state_dict(small, strict=False, assign=True)
        there = {*self.stored.dense, *(f"{name}.weight" for name in self.stored.quantized)}
        if self.tied:
            there |= {f"{OUTPUT}.weight", f"{EMBEDDING}.weight"}
        lacking = sorted(set(missing) - there)
        if lacking or unexpected:
            raise TaskError(
                f"{input_path} does not fit its config.json: missing {lacking[:3]}, unexpected {unexpected[:3]}; "
                "rebuild it: modelpress run"
            )
        shapes: nn.Module = model
        return shapes

    def make_matmul(self, matmul: nn.Module, basename: str, root_input: str, **options: Any) -> str:
        """Add the product with one linear layer."""
        return self._product([self._names[matmul]], basename, root_input, **options)

    def make_packed_matmul(
        self, q_matmul: nn.Module, k_matmul: nn.Module, v_matmul: nn.Module, basename: str, root_input: str, **_: Any
    ) -> str:
        """Add one product for queries, keys and values."""
        # otherwise the builder also passes those of the previous layer to the attention
        self.attention_attrs["k_path"] = self.attention_attrs["v_path"] = ""
        return self._product([self._names[m] for m in (q_matmul, k_matmul, v_matmul)], basename, root_input)

    def is_qkv_projection_packable(self, layer_id: int, attention: Any) -> bool:
        """Whether all three have the same bits; different group sizes have a common block size."""
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return len({self._kind(self._names[part])[0] for part in parts}) == 1

    def make_embedding_lookup(self, embedding: Tensor, basename: str, lm_head: nn.Module) -> str:
        """Add the embedding lookup; a tied, quantized embedding uses the output layer's integers."""
        source = self._source(EMBEDDING)
        if source not in self.stored.quantized:
            if self.tied:
                return str(super().make_embedding_lookup(embedding, basename, lm_head))
            weight = f"{EMBEDDING}.weight"
            self._initializer(weight, _FLOAT, embedding.shape, lambda: self._floats([EMBEDDING]))
            node, inputs, options = "Gather", [weight, "input_ids"], {}
        else:
            bits, size = self._kind(source)
            stem = f"{OUTPUT}.MatMulNBits" if self.tied else f"{EMBEDDING}.GatherBlockQuantized"
            if not self.tied:
                self._blocks(stem, [EMBEDDING], bits, size)
            # the lookup needs a row's bytes contiguous
            flat = [self.vocab_size, self.hidden_size * bits // BYTE]
            shape = f"/model/constants/INT64/[{flat[0]}, {flat[1]}]"
            self.make_reshape(f"{basename}/Reshape", [f"{stem}.qweight", shape], dtype=_BYTES, shape=flat)
            node, inputs = "GatherBlockQuantized", [f"{basename}/Reshape/output_0", "input_ids"]
            inputs += [f"{stem}.scales", f"{stem}.qzeros"]
            options = {"domain": _DOMAIN, "bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        output = f"{basename}/{node}/output_0"
        self.make_node(node, inputs=inputs, outputs=[output], name=f"{basename}/{node}", **options)
        return output

    def _product(
        self, names: list[str], basename: str, root_input: str, logits: bool = False, seq_dim: str = "sequence_length"
    ) -> str:
        """Add the product of `root_input` with the stacked weights of these layers; return its node's name."""
        shapes = [self.weights.get_submodule(name).weight.shape for name in names]
        rows, width = sum(shape[0] for shape in shapes), shapes[0][1]
        bits, _ = self._kind(names[0])
        options: dict[str, Any]
        if bits == UNQUANTIZED:
            node, inputs, options = basename, [root_input, f"{_stem(basename)}.weight"], {}
            self._initializer(inputs[1], _FLOAT, [width, rows], lambda: self._floats(names).T)
        else:
            node = f"{basename}NBits"
            size = min(self._kind(name)[1] for name in names)
            inputs = [root_input, *self._blocks(_stem(node), names, bits, size)]
            options = {"domain": _DOMAIN, "accuracy_level": self.accuracy_level, "K": width, "N": rows}
            options |= {"bits": bits, "block_size": size}
        output = "logits" if logits else f"{node}/output_0"
        self.make_node(node.rpartition("/")[2], inputs=inputs, outputs=[output], name=node, **options)
        self.make_value(output, _FLOAT, shape=self.make_hidden_state_shape(seq_dim=seq_dim, last_dim=rows))
        return node

    def _kind(self, name: str) -> tuple[int, int]:
        """Bits and block size of a layer's weights."""
        if name not in self._kinds:
            kind = (UNQUANTIZED, 0)
            if name in self.stored.quantized:
                found = self.stored.linear(name)
                kind = found.precision.grid.bits, block_size(name, found.weight.group_size)
            self._kinds[name] = kind
        return self._kinds[name]

    def _source(self, name: str) -> str:
        """The layer that stores the weight of `name`: of a tied pair, the quantized one, otherwise the embedding."""
        if self.tied and name in (OUTPUT, EMBEDDING):
            return OUTPUT if OUTPUT in self.stored.quantized else EMBEDDING
        return name

    def _floats(self, names: list[str]) -> Tensor:
        """The stacked weights, float32 [rows, width]."""
        return torch.cat([self.stored.tensor(f"{self._source(name)}.weight").float() for name in names])

    def _blocks(self, stem: str, names: list[str], bits: int, size: int) -> list[str]:
        """Add the three initializers of a quantized weight; return their names."""
        rows = sum(self.weights.get_submodule(name).weight.shape[0] for name in names)
        count = self.weights.get_submodule(names[0]).weight.shape[1] // size
        parts = {
            "integers": ("qweight", _BYTES, [rows, count, size * bits // BYTE]),
            "scales": ("scales", _FLOAT, [rows, count]),
            "zeros": ("qzeros", _BYTES, [rows, -(-count * bits // BYTE)]),
        }
        for part, (end, dtype, shape) in parts.items():
            self._initializer(f"{stem}.{end}", dtype, shape, partial(self._part, part, names, bits, size))
        return [f"{stem}.{end}" for end, _, _ in parts.values()]

    def _part(self, part: str, names: list[str], bits: int, size: int) -> Tensor:
        """One tensor of `Blocks` for stacked layers. Called three times in a row, once per tensor."""
        if self._packed is None or self._packed[0] != names:
            blocks = [pack_blocks(self.stored.linear(name).weight, bits, size) for name in names]
            joined = (torch.cat([getattr(one, field.name) for one in blocks]) for field in fields(Blocks))
            self._packed = names, Blocks(*joined)
        found: Tensor = getattr(self._packed[1], part)
        return found

    def _initializer(self, name: str, dtype: Any, shape: Sequence[int], read: Callable[[], Tensor]) -> None:
        """Add a constant that is read when it is written."""
        sizes = onnx_ir.Shape(shape)
        value = self.make_value(name, dtype, sizes)
        value.const_value = onnx_ir.LazyTensor(
            lambda: onnx_ir.tensor(read().contiguous().numpy(), name=name), dtype, sizes, name=name
        )
        self.model.graph.register_initializer(value)


def _stem(node: str) -> str:
    return node[1:].replace("/", ".")
