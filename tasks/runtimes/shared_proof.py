"""Prove on a loaded model that continuations may share the pass over their context (tasks/runtimes/shared_context.py).

That pass has a mask and positions of our own. Models with recurrent state, and some with sliding windows or with
positions in the mask, ignore them without a word; others stop. No list of families keeps up with that, so the model
itself is asked: fixed questions are scored both ways.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import nn

from tasks.errors import first_line
from tasks.runtimes import Question
from tasks.runtimes.plain_passes import score_plainly
from tasks.runtimes.shared_context import score_shared
from tasks.runtimes.w8a8 import Int8Linear

CONTEXTS = (47, 40)  # tokens: two lengths, so that one row is padded
CONTINUATIONS = (9, 1, 5)  # tokens
EXACT = 1e-3
COARSE = 0.15
# what a model attends to, in tokens, by the names in its config.json
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "local_attention", "window_size")


def longest_shared(model: Any) -> tuple[float, str]:
    """The most tokens of a context with one continuation that may be scored in a shared pass: 0 if none may, infinity
    if any number may. And the reason in words why not more; empty if any number may.

    Both ways score the probe questions. The sums of log-probabilities, over up to 9 tokens, must differ by at most:

    - 1e-3 nats in float32. Rounding moves them by about 1e-5, because the two ways only add in another order. A mask,
      a scale or a position that is not the model's own moves them by 0.01 to 10, as the tests show.
    - 0.15 nats in bfloat16 and float16, or where activations are rounded to 8 bits: there, rounding alone moved the
      sums of a llama of 30 layers by up to 0.05. Differences that are smaller than 0.15 do not show.

    The probe's 56 tokens prove nothing about longer texts where a model changes with their length: beyond a sliding
    window, a chunk, or the original context of `dynamic` and `longrope` positions. There the answer is that length,
    unless the probe is at least twice as long.
    Raises MemoryError or torch.OutOfMemoryError if the probe does not fit in memory.
    """
    questions = _probe(model)
    plain = score_plainly(model, questions, sum(CONTEXTS))
    try:
        shared = score_shared(model, questions)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises on a mask that it does not know
        reason = first_line(error)
        return 0, f"the model does not take the mask of a shared pass ({type(error).__name__}: {reason})"
    pairs = [(a.logprob, b.logprob) for x, y in zip(plain, shared, strict=True) for a, b in zip(x, y, strict=True)]
    difference = max(abs(a - b) for a, b in pairs)
    if not difference <= _tolerance(model):  # also if it is not a number
        return 0, f"a shared pass changes the model's scores (by {difference:.2g} nats on the probe)"
    length = _changes_at(model)
    if 2 * length <= min(CONTEXTS):  # proven far beyond it
        return math.inf, ""
    return length, "" if length == math.inf else f"beyond {length} tokens the model's attention or positions change"


def _probe(model: Any) -> list[Question]:
    """Questions of fixed random tokens: the same in every run."""
    words = model.config.get_text_config().vocab_size
    draw = random.Random(0)  # noqa: S311

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(words) for _ in range(count))

    return [Question(tokens(size), tuple(tokens(each) for each in CONTINUATIONS)) for size in CONTEXTS]


def _tolerance(model: Any) -> float:
    exact = model.dtype == torch.float32 and not any(map(_rounds_activations, model.modules()))
    return EXACT if exact else COARSE


def _rounds_activations(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return (
        isinstance(module, Int8Linear)
        or getattr(module, "rounds_activations", False)  # tasks/runtimes/dense.py
        or getattr(scheme, "input_activations", None) is not None
        or (isinstance(module, nn.Linear) and bool(module._forward_pre_hooks))  # tasks/activation_rounding.py
    )


def _changes_at(model: Any) -> float:
    """The number of tokens beyond which the model attends or counts positions in another way; infinity if none."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    found = [getattr(config, name, None) for name in _WINDOWS]
    if kinds == {"full_attention"}:
        found = []
    rope = getattr(config, "rope_parameters", None) or {}
    for values in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if values.get("rope_type") in ("dynamic", "longrope"):
            found.append(values.get("original_max_position_embeddings") or config.max_position_embeddings)
    lengths = [size for size in found if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    return min(lengths, default=math.inf)
