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

from tasks.output import write_text
from tasks.runtimes import Runtime
from tasks.text.bos import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "texts.jsonl"
NEW_TOKENS = 24  # of each text, unless the model ends it before
PASS_TOKENS = 512  # of a forward pass for the log-probabilities


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
    import torch

    read = [prompt_ids(runtime.tokenizer, text) for text in texts]
    alike: dict[int, list[int]] = defaultdict(list)  # by length: without padding, any model sees what it would alone
    for number, ids in enumerate(read):
        alike[len(ids)].append(number)
    # all of them first: a runtime may hold either its generator or its scorer
    groups = [
        (numbers, runtime.generate_ids(torch.tensor([read[i] for i in numbers]), NEW_TOKENS).cpu())
        for numbers in alike.values()
    ]
    found: dict[int, Completion] = {}
    for numbers, rows in groups:
        start = rows.shape[1] - NEW_TOKENS
        passes = rows.split(max(1, PASS_TOKENS // rows.shape[1]))
        best = [runtime.logprobs(some[:, :-1])[:, start - 1 :].topk(2) for some in passes]
        best_ids, best_logprobs = (torch.cat([one[part] for one in best]).tolist() for part in (1, 0))
        for row, number in enumerate(numbers):
            ids = _ended(rows[row, start:].tolist(), best_ids[row], ends)
            text, length = _text(runtime.tokenizer, read[number], ids), len(ids)
            likely = best_ids[row][:length], best_logprobs[row][:length]
            found[number] = Completion(texts[number], read[number], ids, text, *likely)
    return [found[number] for number in range(len(texts))]


def _ended(ids: list[int], best_ids: list[list[int]], ends: Collection[int]) -> list[int]:
    """Cut a text after its end token, at which runtimes write on."""
    for place, (first, _) in enumerate(best_ids):
        if end := [token for token in (first, ids[place]) if token in ends]:
            return [*ids[:place], end[0]]
    return ids


def _text(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """The text of `ids`, with the space that some tokenizers leave out at the start of a text."""
    prompt, whole = _decoded(tokenizer, before), _decoded(tokenizer, before + ids)
    return whole.removeprefix(prompt) if whole.startswith(prompt) else _decoded(tokenizer, ids)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def write_completions(folder: Path, found: Sequence[Completion]) -> None:
    """Write texts.jsonl."""
    lines: list[dict[str, Any]] = [asdict(one) for one in found]
    write_text(folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
