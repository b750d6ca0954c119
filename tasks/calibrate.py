"""The calibrate stage: pack text from weighted sources into full token sequences, with a quality report.

python -m tasks.calibrate
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.errors import TaskError
from tasks.output import whole_directory, write_json
from tasks.program import run_stage
from tasks.settings import CalibrationSettings, CalibrationSource, DataSource, Settings
from tasks.text.bos import begins_with_bos, without_bos
from tasks.text.chat import render
from tasks.text.contamination import Match, check_overlap, find_overlap, ngrams
from tasks.text.documents import SEPARATOR, documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 32  # characters; a shorter document is noise
CHOICE = 64  # sequences are drawn from up to this many times the text needed


@dataclass(frozen=True)
class SourceReport:
    """One source: documents, documents read and their tokens; tokens used, in how many sequences and excerpts; and
    dropped documents by reason. Long documents are cut at the ends of excerpts, never dropped."""

    documents: int
    read: int
    tokens_read: int
    tokens: int
    sequences: int
    excerpts: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class CalibrationReport:
    """calibration.json: `coverage` is the share of the vocabulary that occurs; `bos`: each sequence begins with it."""

    samples: int
    sequence_length: int
    tokens: int
    seed: int
    bos: bool
    sources: dict[str, SourceReport]
    vocabulary: int
    vocabulary_seen: int
    coverage: float
    overlap_ngram: int
    overlap_limit: int
    overlap: dict[str, Match]


def calibrate(
    settings: CalibrationSettings,
    evaluation: dict[str, DataSource],
    model: Path,
    raw: Path,
    destination: Path,
) -> CalibrationReport:
    """Pack tokens and write `tokens.safetensors` (input_ids, int64 [samples, sequence_length]) and `calibration.json`.

    evaluation: the data sets that the calibration text must not contain, by name under `raw`.
    TaskError if a source has too little text, or if more evaluation items than `overlap.limit` share an n-gram with it.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = begins_with_bos(tokenizer)
    length = settings.sequence_length - bos
    rows: list[list[int]] = []
    reports: dict[str, SourceReport] = {}
    seen: set[int] = set()
    for name, count in tqdm(shares(settings).items(), desc="packing"):
        sequences, reports[name] = _pack(raw, name, settings, tokenizer, count, length)
        rows += [[tokenizer.bos_token_id, *ids] if bos else ids for ids in sequences]
        for text in tokenizer.batch_decode(sequences):
            seen |= ngrams(text, settings.overlap.ngram)
    random.Random(settings.seed).shuffle(rows)  # noqa: S311
    overlap = {
        name: find_overlap(raw, name, source, seen, settings.overlap.ngram)
        for name, source in tqdm(evaluation.items(), desc="checking for evaluation items in the text")
    }
    check_overlap(overlap, settings.overlap)
    used = Counter(token for row in rows for token in row)
    report = CalibrationReport(
        samples=len(rows),
        sequence_length=settings.sequence_length,
        tokens=len(rows) * settings.sequence_length,
        seed=settings.seed,
        bos=bos,
        sources=reports,
        vocabulary=len(tokenizer),
        vocabulary_seen=len(used),
        coverage=len(used) / len(tokenizer),
        overlap_ngram=settings.overlap.ngram,
        overlap_limit=settings.overlap.limit,
        overlap=overlap,
    )
    with whole_directory(destination) as work:
        save_file({"input_ids": torch.tensor(rows, dtype=torch.int64)}, work / "tokens.safetensors")
        write_json(work / "calibration.json", asdict(report))
    return report


def shares(settings: CalibrationSettings) -> dict[str, int]:
    """The number of sequences from each source, by weight, summing to `samples` (largest remainder method)."""
    total = sum(source.weight for source in settings.sources.values())
    exact = {name: settings.samples * source.weight / total for name, source in settings.sources.items()}
    count = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: count[name] - exact[name])
    for name in by_remainder[: settings.samples - sum(count.values())]:
        count[name] += 1
    return count


def _pack(
    raw: Path,
    name: str,
    settings: CalibrationSettings,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
) -> tuple[list[list[int]], SourceReport]:
    """Draw `count` sequences of `length` tokens from excerpts of one source's documents, in random order."""
    source = settings.sources[name]
    found = list(documents(raw, name, source))
    order = random.Random(f"{settings.seed} {name}")  # noqa: S311
    order.shuffle(found)
    dropped: Counter[str] = Counter()
    stream: list[int] = []
    used = 0
    # draw from more text than needed, so that no long document fills the share alone
    plenty = count * length * CHOICE
    for text in _texts(found, source, tokenizer, name, settings.chat_date, dropped):
        if len(stream) >= plenty:
            break
        stream += tokenizer(text + SEPARATOR, add_special_tokens=False).input_ids
        used += 1
    size = min(settings.excerpt or length, length)
    each = math.ceil(length / size)
    pieces = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    if len(pieces) < count * each:
        lost = "".join(f", {number} {reason}" for reason, number in dropped.items())
        raise TaskError(
            f"calibration source {name} has {len(stream)} tokens, its share is {count * each * size} "
            f"({count} sequences of {length}; {len(found)} documents{lost}); lower calibration.samples or its weight, "
            "or add text"
        )
    drawn = order.sample(pieces, count * each)
    # truncate the last excerpt
    sequences = [list(chain(*drawn[i : i + each]))[:length] for i in range(0, len(drawn), each)]
    report = SourceReport(len(found), used, len(stream), count * length, count, len(drawn), dict(dropped))
    return sequences, report


def _texts(
    found: Iterable[Any],
    source: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    date: str,
    dropped: Counter[str],
) -> Iterator[str]:
    for value in found:
        if source.chat_template and value is not None:
            value = _conversation(value, tokenizer, name, date)
        if not isinstance(value, str):
            dropped["not text"] += 1
        elif len(value.strip()) < SHORTEST:
            dropped["too short"] += 1
        else:
            yield value.strip()


def _conversation(value: Any, tokenizer: PreTrainedTokenizerBase, name: str, date: str) -> str:
    """Apply the model's chat template to a list of messages, or to a text as the only user message."""
    if not tokenizer.chat_template:
        raise TaskError(
            f"calibration source {name} has chat_template true, but the model has no chat template; set it to false"
        )
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    try:
        # each sequence gets its BOS when it is packed
        return without_bos(tokenizer, render(tokenizer, messages, date))
    except Exception as error:
        raise TaskError(f"calibration source {name}: the chat template refuses {str(value)[:80]!r}: {error}") from error


def main() -> None:
    """Run the stage in the current directory."""

    def work(settings: Settings) -> None:
        evaluation = {**settings.evaluation.sources, **settings.evaluation.texts}
        report = calibrate(
            settings.calibration,
            evaluation,
            Path("models/source"),
            Path("data/raw"),
            Path("data/calibration"),
        )
        write_json(Path("metrics/calibrate.json"), asdict(report))
        print(f"{report.samples} sequences of {report.sequence_length} tokens, {report.coverage:.0%} of the vocabulary")

    run_stage(work)


if __name__ == "__main__":
    main()
