"""A tiny random model and a tiny corpus: reproducible files in the real formats."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # pressed since the first version: their bytes must not change
CONTEXT = 256  # the model's context length
LLAMA3 = {  # rotary parameters that change a short text
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NO_STATISTICS = Path("no", "statistics")  # for tests that must not read statistics

_PEOPLE, _THINGS, _VERBS, _PLACES = (
    words.split()
    for words in (
        "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo June",
        "lamp river engine garden letter violin bridge kettle window ladder map stone",
        "paints carries repairs finds sells measures hides admires borrows cleans",
        "harbour market valley library station kitchen forest tower school island",
    )
)
_WHEN = ["at dawn", "after lunch", "in winter", "every Monday", "before the storm", "late at night"]


@dataclass(frozen=True)
class Corpus:
    """The files of `tiny_corpus`, with the same keys as the embedded default data sets."""

    text: Path  # documents, one blank line between two
    tagged: Path  # documents in <doc id="..."> ... </doc>, as the wiki text of the defaults
    records: Path  # JSONL: {"text"}
    chats: Path  # JSONL: {"messages": [{"role", "content"}, ...]}
    piqa: Path  # JSONL: {"question", "options", "answer"}, 2 options
    openbookqa: Path  # 4 options
    commonsenseqa: Path  # 5 options; the options start with a line break
    boolq: Path  # JSONL: {"question", "title", "passage", "answer": "True" or "False"}
    news: Path  # JSONL: {"id", "document"}
    medical: Path  # JSONL: {"question", "passage"}


def tiny_model(
    directory: Path,
    *,
    family: str = "llama",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    seed: int = 0,
    steps: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model of the `family` (its model_type in config.json) with tied embeddings, and its tokenizer, to
    `directory` (bfloat16 safetensors). changes: other values of its configuration.

    The weights are random, with logits about 2 apart. With `steps` > 0 the model is trained for that many steps on the
    corpus's sentences, so that damage shows in its perplexity. Returns `directory`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(vocab)
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }
    config = AutoConfig.for_model(family, **values | ids | dict(changes or {}))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    if steps:
        train(model, tokenizer, steps, seed)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def randomize(model: Any, seed: int = 0) -> None:
    """Random matrices with which logits are about 2 apart."""
    import torch

    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 0.3 if "embed" in name else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=numbers) * scale)


def train(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, start: str = "") -> None:
    """Train a model on the corpus's sentences. start: of each document."""
    import torch

    texts = tokenizer([f"{start}{t}\n\n" for t in _documents(random.Random(seed), 200)]).input_ids
    ids = torch.tensor([i for text in texts for i in text])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,), generator=order)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def tiny_tokenizer(vocab: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens, trained on the corpus's sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_documents(random.Random(0), 50), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def tiny_corpus(directory: Path, *, documents: int = 60, items: int = 24, seed: int = 0) -> Corpus:
    """Write every file of a `Corpus` to `directory`: `documents` texts each, `items` questions each."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)

    def texts() -> list[str]:
        return _documents(rng, documents)

    text, tagged = directory / "text.txt", directory / "tagged.txt"
    text.write_text("\n\n".join(texts()) + "\n", encoding="utf-8")
    marked = (f'<doc id="{i}" title="t{i}">\n{t}\n</doc>' for i, t in enumerate(texts()))
    tagged.write_text("\n".join(marked) + "\n", encoding="utf-8")
    return Corpus(
        text=text,
        tagged=tagged,
        records=_jsonl(directory / "records.jsonl", ({"text": t} for t in texts())),
        chats=_jsonl(directory / "chats.jsonl", ({"messages": _chat(t)} for t in texts())),
        piqa=_jsonl(directory / "piqa.jsonl", (_choice(rng, 2) for _ in range(items))),
        openbookqa=_jsonl(directory / "openbookqa.jsonl", (_choice(rng, 4) for _ in range(items))),
        commonsenseqa=_jsonl(directory / "commonsenseqa.jsonl", (_choice(rng, 5, "\n") for _ in range(items))),
        boolq=_jsonl(directory / "boolq.jsonl", (_yes_no(rng) for _ in range(items))),
        news=_jsonl(directory / "news.jsonl", ({"id": str(i), "document": t} for i, t in enumerate(texts()))),
        medical=_jsonl(directory / "medical.jsonl", ({"question": _sentence(rng), "passage": t} for t in texts())),
    )


def _documents(rng: random.Random, count: int) -> list[str]:
    return [" ".join(_sentence(rng) for _ in range(rng.randint(4, 12))) for _ in range(count)]


def _sentence(rng: random.Random) -> str:
    person, other = rng.sample(_PEOPLE, 2)
    return (
        f"{person} {rng.choice(_VERBS)} the {rng.choice(_THINGS)} of {other} "
        f"near the {rng.choice(_PLACES)} {rng.choice(_WHEN)}."
    )


def _chat(text: str) -> list[dict[str, str]]:
    first, rest = text.split(". ", 1)
    return [{"role": "user", "content": first + "?"}, {"role": "assistant", "content": rest}]


def _choice(rng: random.Random, options: int, start: str = "") -> dict[str, str]:
    named = [f"{'ABCDE'[i]}. the {thing}" for i, thing in enumerate(rng.sample(_THINGS, options))]
    question = f"What does {rng.choice(_PEOPLE)} see near the {rng.choice(_PLACES)} {rng.choice(_WHEN)}?"
    return {"question": question, "options": start + "\n".join(named), "answer": rng.choice(named)}


def _yes_no(rng: random.Random) -> dict[str, str]:
    passage = " ".join(_sentence(rng) for _ in range(3))
    question = f"does {rng.choice(_PEOPLE)} like the {rng.choice(_PLACES)}"
    return {"question": question, "title": "t", "answer": rng.choice(["True", "False"]), "passage": passage}


def _jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path
