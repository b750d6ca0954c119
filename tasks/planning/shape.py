"""What a model's config.json says of its size: linear layers by the input that they read, parameters, bytes.

Pure arithmetic: needs no weights and no model library, so that a model can be planned for before it is fetched.

python -m tasks.planning.shape hf:organisation/name@revision    # fetches its config.json alone, and says where that is
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.errors import TaskError

DENSE = ("llama", "mistral", "qwen2", "qwen3")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
_BIASED = ("qwen2", "qwen2_moe")  # queries, keys and values have a bias, whatever the config says
_NORMED = ("qwen3", "qwen3_moe")  # queries and keys are normed


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input. rows: of each of them; width: of the input; copies: how often such a
    group stands in a layer (once for each expert), active: how many of the copies see a token."""

    name: str
    rows: tuple[int, ...]
    width: int
    copies: int = 1
    active: int = 1

    @property
    def weights(self) -> int:
        """Weights of one copy."""
        return sum(self.rows) * self.width


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its linear layers, and how many other parameters it has (norms, biases, routers)."""

    groups: tuple[Group, ...]
    others: int

    @property
    def weights(self) -> int:
        """Weights of all its linear layers."""
        return sum(group.copies * group.weights for group in self.groups)

    @property
    def active(self) -> int:
        """Weights that a token meets."""
        return sum(group.active * group.weights for group in self.groups)

    @property
    def parameters(self) -> int:
        """All of it."""
        return self.weights + self.others


@dataclass(frozen=True)
class Shape:
    """A decoder language model. heads: of queries. attention: channels of all of them together, kv: of all keys."""

    family: str
    hidden: int
    heads: int
    attention: int
    kv: int
    vocabulary: int
    tied: bool
    layers: tuple[Layer, ...]

    @property
    def embedding(self) -> int:
        """Weights of the embedding; an output layer of its own has as many."""
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside the decoder layers: embedding, output layer, last norm."""
        return self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them, each once."""
        return self.outside + sum(layer.parameters for layer in self.layers)

    @property
    def largest(self) -> Layer:
        """The layer with the most parameters."""
        return max(self.layers, key=lambda layer: layer.parameters)


def read_shape(config: Mapping[str, Any], where: str) -> Shape:
    """The shape that `config` (config.json) describes; TaskError naming `where` and what is missing or unknown."""
    family = config.get("model_type")
    if family not in (*DENSE, *EXPERTS):
        raise TaskError(
            f"{where} describes a model of type {family!r}; a plan can be made for {', '.join((*DENSE, *EXPERTS))}"
        )
    hidden = _number(config, "hidden_size", where)
    heads = _number(config, "num_attention_heads", where)
    kv_heads = _number(config, "num_key_value_heads", where, heads)
    head = _number(config, "head_dim", where, hidden // heads)
    query, kv = heads * head, kv_heads * head
    biases = query + 2 * kv if family in _BIASED else query + 2 * kv + hidden if config.get("attention_bias") else 0
    others = 2 * hidden + biases + (2 * head if family in _NORMED else 0)
    attention = (Group("q_proj, k_proj, v_proj", (query, kv, kv), hidden), Group("o_proj", (hidden,), query))
    layers = []
    for index in range(_number(config, "num_hidden_layers", where)):
        groups, more = _mlp(config, family, index, hidden, where)
        layers.append(Layer(attention + groups, others + more))
    tied = bool(config.get("tie_word_embeddings", False))
    return Shape(family, hidden, heads, query, kv, _number(config, "vocab_size", where), tied, tuple(layers))


def _mlp(config: Mapping[str, Any], family: str, index: int, hidden: int, where: str) -> tuple[tuple[Group, ...], int]:
    """The feed-forward part of layer `index`, and its parameters that are in no pressed linear layer."""
    sparse = (index + 1) % (config.get("decoder_sparse_step") or 1) == 0 and index not in (
        config.get("mlp_only_layers") or ()
    )
    if family in DENSE or not sparse:
        inner = _number(config, "intermediate_size", where)
        return _gated(hidden, inner), 2 * inner + hidden if config.get("mlp_bias") else 0
    # qwen's name for it; mixtral's, under which transformers 5 saves both
    experts = _number(config, "num_experts" if config.get("num_experts") else "num_local_experts", where)
    active = _number(config, "num_experts_per_tok", where)
    inner = _number(config, "intermediate_size" if family == "mixtral" else "moe_intermediate_size", where)
    groups, router = _gated(hidden, inner, experts, active, "experts: "), experts * hidden
    if family == "qwen2_moe":
        shared = _number(config, "shared_expert_intermediate_size", where)
        return groups + _gated(hidden, shared, name="shared expert: "), router + hidden
    return groups, router


def _gated(hidden: int, inner: int, copies: int = 1, active: int = 1, name: str = "") -> tuple[Group, ...]:
    return (
        Group(f"{name}gate_proj, up_proj", (inner, inner), hidden, copies, active),
        Group(f"{name}down_proj", (hidden,), inner, copies, active),
    )


def _number(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TaskError(f"{where}: {key} is {value!r}, expected a positive whole number; is it a model's config.json?")
    return value


def main() -> None:
    """Fetch the config.json of the model on the hub that the command line names, and print its path."""
    # the hub's library, which a plan needs for nothing else
    from tasks.sources import hub
    from tasks.sources.address import HubAddress, parse
    from tasks.sources.files import DOWNLOADS

    try:
        address = parse(sys.argv[1])
        if not isinstance(address, HubAddress):
            raise ValueError(f"{sys.argv[1]} is not hf:organisation/name@revision")
        found = hub.fetch_file(
            HubAddress(address.repository, address.revision, "config.json"), None, "model", DOWNLOADS
        )
    except (TaskError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(found.file)


if __name__ == "__main__":
    main()
