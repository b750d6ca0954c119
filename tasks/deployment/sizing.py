"""Spread a model over the described hardware: pure functions from its shape to parallelism, context and sequences.

The rules of divisibility are vLLM's own (vllm/config/model.py, and its classes QKVParallelLinear and
VocabParallelEmbedding). Two numbers are assumptions: `ACTIVATIONS` and `PROCESS`. vLLM measures when it starts what is
really left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import ceil

from tasks.deployment.shape import Shape
from tasks.errors import TaskError
from tasks.settings import HardwareSettings

GB, GIB = 10**9, 2**30
SHARE = 0.9  # of a GPU's or a machine's memory that the server may use
ACTIVATIONS = 2 * GB  # assumed, on each GPU: activations and CUDA graphs
PROCESS = 4 * GB  # assumed, on a CPU: the process and its libraries
UNDESCRIBED = 4 * GIB  # KV cache on a machine that is not described
SHORTEST = 2048  # tokens; with less room in the KV cache, a model does not fit
CONVERSATION = 1024  # tokens that a sequence is expected to have, to choose how many run at once
SEQUENCES = 256  # at most at once
PADDING = 64  # vLLM rounds the vocabulary up to a multiple of this


@dataclass(frozen=True)
class Plan:
    """How the model is served.

    tensor, pipeline: parallelism of one copy; with a pipeline, each of its stages is a machine. copies: on one machine.
    machines: all. longest: tokens that the model can read, None if it states none. context: of them, those served.
    sequences: at once. kv_tokens: in the KV cache of a copy. room: bytes for it on the fullest card, which can be
    negative. card_weights, card_token: bytes on that card, of weights and for each token. unused: cards of a machine.
    experts: of each mixture, which copies that answer as one spread over their cards; 0: none.
    """

    tensor: int
    pipeline: int
    copies: int
    machines: int
    longest: int | None
    context: int | None
    sequences: int
    kv_tokens: int
    room: int
    card_weights: int
    card_token: int
    unused: int = 0
    experts: int = 0

    @property
    def shortened(self) -> bool:
        """Whether the KV cache cannot hold a text of full length."""
        return self.context != self.longest

    @property
    def grouped(self) -> bool:
        """Whether one copy needs several machines."""
        return self.pipeline > 1

    @property
    def joined(self) -> bool:
        """Whether several machines can answer as one: with parts of a copy, or with copies that share the experts."""
        return self.machines > 1 and (self.grouped or self.experts % (self.cards * self.machines) == 0)

    @property
    def servers(self) -> int:
        """Servers that are independent of one another, if machines are joined only where they must be."""
        return self.machines // self.pipeline

    @property
    def engines(self) -> int:
        """Copies of the model on all machines, each of which is an engine of vLLM with metrics of its own."""
        return self.servers * self.copies

    @property
    def cards(self) -> int:
        """Cards in use on one machine."""
        return self.tensor * self.copies


def obstacles(shape: Shape, cards: int) -> list[str]:
    """What cannot be split over `cards` cards (tensor parallelism); empty if everything can."""
    if cards == 1:
        return []
    found = []
    if not shape.heads or shape.heads % cards:
        found.append(f"{shape.heads} attention heads")
    if shape.kv_heads and shape.kv_heads % cards and cards % shape.kv_heads:
        found.append(f"{shape.kv_heads} key-value heads")
    if PADDING * ceil(shape.vocabulary / PADDING) % cards:
        found.append(f"a vocabulary of {shape.vocabulary:,}")
    for name, width in shape.widths.items():
        if width % cards:
            found.append(f"{name} {width:,}")
        elif shape.group and width // cards % shape.group:
            found.append(f"{name} {width:,} in groups of {shape.group}")
    return found


def plan(shape: Shape, hardware: HardwareSettings | None) -> Plan:
    """The smallest part of the hardware whose KV cache holds a text of full length, and copies on the rest.

    If no part does, the part that holds the longest text. TaskError with the numbers if the model does not fit.
    """
    if hardware is None or hardware.gpu is None:
        return _on_processor(shape, hardware)
    splits = [(cards, 1) for cards in range(1, hardware.cards + 1) if not obstacles(shape, cards)]
    widest = splits[-1][0]
    splits += [(widest, stages) for stages in range(2, min(hardware.machines, shape.layers) + 1)]
    sized = [_on_cards(shape, hardware, tensor, stages) for tensor, stages in splits]
    for one in sized:
        if one.kv_tokens >= (shape.context or SHORTEST):
            return one
    best = max(sized, key=lambda one: (one.kv_tokens, one.room))
    if best.kv_tokens < min(shape.context or SHORTEST, SHORTEST):
        raise TaskError(_refusal(shape, hardware, widest, best))
    return best


def _on_cards(shape: Shape, hardware: HardwareSettings, tensor: int, stages: int) -> Plan:
    deepest = ceil(shape.layers / stages) / shape.layers
    weights = ceil((shape.layer_bytes * deepest + shape.outer_bytes) / tensor)
    # every card keeps at least one key-value head, and a compressed cache (kv_heads is 0) whole
    share = deepest * max(1, ceil(shape.kv_heads / tensor)) / max(1, shape.kv_heads)
    token, sequence = ceil(shape.kv_token * share), ceil(shape.kv_sequence * share)
    copies = hardware.cards // tensor if stages == 1 else 1
    if shape.experts:  # vLLM spreads the experts over the copies
        copies = max(n for n in range(1, copies + 1) if n == 1 or shape.experts % (tensor * n) == 0)
    room = round(SHARE * hardware.memory * GB) - ACTIVATIONS - weights
    tokens, context, sequences = _held(shape, room, token, sequence)
    return Plan(
        tensor=tensor,
        pipeline=stages,
        copies=copies,
        machines=hardware.machines,
        longest=shape.context,
        context=context,
        sequences=sequences,
        kv_tokens=tokens,
        room=room,
        card_weights=weights,
        card_token=token,
        unused=hardware.cards - tensor * copies,
        experts=shape.experts,
    )


def _on_processor(shape: Shape, hardware: HardwareSettings | None) -> Plan:
    """Serve from the memory of one machine; with several machines, a copy on each."""
    full = shape.kv_token * (shape.context or SHORTEST) + shape.kv_sequence
    wanted = GIB * max(1, ceil(4 * full / GIB))  # four texts of full length
    least = shape.kv_token * SHORTEST + shape.kv_sequence
    left = (
        max(UNDESCRIBED, least + GIB)
        if hardware is None
        else round(SHARE * hardware.memory * GB) - shape.weights - PROCESS
    )
    room = min(wanted, max(0, left // GIB * GIB))
    tokens, context, sequences = _held(shape, room, shape.kv_token, shape.kv_sequence)
    if tokens < min(shape.context or SHORTEST, SHORTEST):
        assert hardware is not None  # otherwise there is room
        raise TaskError(
            f"package.hardware has {hardware.memory:g} GB of memory and no GPU, too little for this model: "
            f"{gigabytes(shape.weights)} of weights and {gigabytes(PROCESS)} for the server's process leave "
            f"{gigabytes(room)} for a KV cache that needs {shape.kv_token:,} bytes per token and at least {SHORTEST:,} "
            "tokens; describe more memory or GPUs, or package a smaller variant"
        )
    return Plan(
        tensor=1,
        pipeline=1,
        copies=1,
        machines=hardware.machines if hardware else 1,
        longest=shape.context,
        context=context,
        sequences=sequences,
        kv_tokens=tokens,
        room=room,
        card_weights=shape.weights,
        card_token=shape.kv_token,
        experts=shape.experts,
    )


def _held(shape: Shape, room: int, token: int, sequence: int) -> tuple[int, int | None, int]:
    """The tokens that `room` bytes hold in one sequence, the context served, and the sequences at once."""
    wanted = shape.context or SHORTEST
    if room <= sequence:
        return 0, shape.context, 1
    tokens = (room - sequence) // token if token else wanted
    context = shape.context and min(shape.context, tokens // 256 * 256 or tokens)
    each = token * min(CONVERSATION, wanted) + sequence
    return tokens, context, max(1, min(SEQUENCES, room // each if each else SEQUENCES))


def _refusal(shape: Shape, hardware: HardwareSettings, widest: int, best: Plan) -> str:
    why = obstacles(shape, widest + 1) if widest < hardware.cards else []
    have = f"{hardware.machines * hardware.cards} x {hardware.memory:g} GB ({hardware.gpu})"
    split = f"split over {best.tensor * best.pipeline}, {gigabytes(best.card_weights)} are on each card"
    return (
        f"package.hardware has {have}, too little for this model: of its {gigabytes(shape.weights)} of weights, "
        f"{split}, which leaves {gigabytes(best.room)} for a KV cache that needs {best.card_token:,} bytes per token "
        f"and at least {SHORTEST:,} tokens; describe more memory, cards or machines, or package a smaller variant"
        + (f" ({widest + 1} cards cannot share {', '.join(why)})" if why else "")
    )


def gigabytes(number: float) -> str:
    """Bytes as GB with three significant digits, such as `40.2 GB`."""
    value = number / GB
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(digits, 0), 3)}f} GB"
