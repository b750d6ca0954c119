"""Greedy texts after a fixed set of short prompts: what a reader compares, and what a served engine must write.

The prompts are in prompts.json, and continued as they are, without a chat template. They have equally many tokens in
the demo's tokenizer, so its runtime reads and writes all of them side by side.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.output import write_text
from tasks.runtimes import Runtime
from tasks.text.bos import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "texts.jsonl"
NEW_TOKENS = 32  # of each text, unless the model ends it before


@dataclass(frozen=True)
class Completion:
    """A line of texts.jsonl.

    prompt_ids: all that the model reads, with BOS where the tokenizer adds it. ids: the greedy continuation; an end
    token is its last. text: the ids decoded, without special tokens. best_ids, best_logprobs: for each place of `ids`,
    the two most likely tokens and their natural log-probabilities, best first, from one forward pass over prompt and
    continuation in the evaluation's dtype. `ids` were chosen one by one, with a KV cache: where rounding decides a tie,
    the token of `ids` can be the second.
    """

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    text: str
    best_ids: list[list[int]]
    best_logprobs: list[list[float]]


def prompts() -> list[str]:
    """The fixed prompts."""
    return list(json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8")))


def complete(runtime: Runtime, ends: Collection[int], texts: Sequence[str]) -> list[Completion]:
    """Continue each of `texts` greedily by `NEW_TOKENS`, or up to one of the tokens `ends`."""
    read = [prompt_ids(runtime.tokenizer, text) for text in texts]
    alike: dict[int, list[int]] = defaultdict(list)  # by length: without padding, any model sees what it would alone
    for number, ids in enumerate(read):
        alike[len(ids)].append(number)
    rows: dict[int, torch.Tensor] = {}
    for numbers in alike.values():  # all of them first: a runtime may hold either its generator or its scorer
        written = runtime.generate_ids(torch.tensor([read[i] for i in numbers]), NEW_TOKENS)
        rows |= dict(zip(numbers, written.cpu(), strict=True))
    return [_completion(runtime, text, read[i], rows[i], ends) for i, text in enumerate(texts)]


def _completion(
    runtime: Runtime, prompt: str, before: list[int], row: torch.Tensor, ends: Collection[int]
) -> Completion:
    start = len(before)
    best = runtime.logprobs(row[None, :-1])[0, start - 1 :].topk(2)
    best_ids, best_logprobs = best.indices.tolist(), best.values.tolist()
    ids = row[start:].tolist()
    for place, (first, _) in enumerate(best_ids):
        # runtimes write on where the model would end
        if end := [token for token in (first, ids[place]) if token in ends]:
            ids = [*ids[:place], end[0]]
            break
    shown = [_decoded(runtime.tokenizer, some) for some in (before, before + ids)]
    text = shown[1].removeprefix(shown[0]) if shown[1].startswith(shown[0]) else _decoded(runtime.tokenizer, ids)
    return Completion(prompt, before, ids, text, best_ids[: len(ids)], best_logprobs[: len(ids)])


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def write_completions(folder: Path, found: Sequence[Completion]) -> None:
    """Write texts.jsonl."""
    lines: list[dict[str, Any]] = [asdict(one) for one in found]
    write_text(folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
