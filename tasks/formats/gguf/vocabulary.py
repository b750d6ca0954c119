"""A tokenizer in GGUF metadata: tokens, their types, merges and llama.cpp's pre-tokenization rule.

Two kinds of tokenizer are supported: byte-level BPE with one of the rules in `_rules()`, and SentencePiece-style BPE
(Llama 2, Mistral). The names and rules are llama.cpp's (src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from tasks.errors import TaskError
from tasks.text import pretokenizer_rules
from tasks.text.bos import begins_with_bos
from tasks.text.end_tokens import end_tokens

if TYPE_CHECKING:
    from gguf import GGUFWriter

# texts at which every version of llama.cpp stops (src/llama-vocab.cpp, special_eog_ids)
_KNOWN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>")
_END_KEYS = 2  # beside EOS
_SPACE = "\u2581"  # SentencePiece's


def add_vocabulary(writer: GGUFWriter, model: Path, size: int) -> None:
    """Write the tokenizer of the directory `model` into the file; `size`: rows of the model's embedding.

    TaskError if llama.cpp does not support the tokenizer. Tokens without a row in the embedding are left out.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = rule_for_words(described, model)
    if rule is None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_first(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
    tokens, kinds = _tokens(tokenizer, size, sentencepiece=rule is None)
    writer.add_token_list(tokens)
    if rule is None:
        # tokens are in the order of the merges: an earlier one wins
        writer.add_token_scores([-float(number) for number in range(size)])
    else:
        writer.add_token_merges([_merge(merge) for merge in described["model"]["merges"]])
    writer.add_token_types(kinds)
    for name, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < size:
            add(number)
    _add_end_tokens(writer, model, tokenizer, tokens)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_end_tokens(writer: GGUFWriter, model: Path, tokenizer: Any, tokens: list[str]) -> None:
    """Name the end tokens beside EOS that llama.cpp does not know by their texts, as far as the format has keys.

    llama.cpp stops at the tokens of the keys eos, eot and eom, and at those with texts in its list. The key eom comes
    first, because nothing else depends on it.
    """
    ends = [number for number in end_tokens(model, tokenizer) if number < len(tokens)]
    others = [n for n in ends if n != tokenizer.eos_token_id and tokens[n] not in _KNOWN_ENDS]
    for number, add in zip(others, (writer.add_eom_token_id, writer.add_eot_token_id), strict=False):
        add(number)
    if len(others) > _END_KEYS:
        left = ", ".join(tokens[number] for number in others[_END_KEYS:])
        print(f"a GGUF file has no key for more end tokens: llama.cpp does not stop at {left}", flush=True)


def rule_for_words(described: dict[str, Any], model: Path) -> str | None:
    """llama.cpp's name of the pre-tokenization rule; None: SentencePiece."""
    kind = described["model"]["type"]
    if kind == "BPE":
        steps = _steps(described["pre_tokenizer"])
        for name, rule in _rules().items():
            if steps == rule:
                return name
        if described["model"].get("byte_fallback") and not any(step[0] == "ByteLevel" for step in steps):
            return None
        found = f"a BPE tokenizer with the pre-tokenization {steps}"
    else:
        found = f"a tokenizer of the kind {kind}"
    raise TaskError(
        f"{model} has {found}; the target gguf supports the rules of {', '.join(_rules())} and SentencePiece; "
        "use another target"
    )


def _rules() -> dict[str, list[tuple[Any, ...]]]:
    return {
        "gpt-2": [("ByteLevel", True)],
        "smollm": [("Digits", True), ("ByteLevel", True)],
        "llama-bpe": [("Split", pretokenizer_rules.LLAMA3), ("ByteLevel", False)],
        "qwen2": [("Split", pretokenizer_rules.QWEN2), ("ByteLevel", False)],
    }


def _steps(described: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """The steps of a pre-tokenizer, each as its name and its distinguishing option."""
    if described is None:
        return []
    steps: list[tuple[Any, ...]] = []
    for step in described.get("pretokenizers", [described]):
        match step["type"]:
            case "ByteLevel":
                steps.append((*("ByteLevel", step["use_regex"]), *(["prefix"] if step["add_prefix_space"] else [])))
            case "Digits":
                steps.append(("Digits", step["individual_digits"]))
            case "Split" if step["behavior"] == "Isolated" and not step["invert"]:
                steps.append(("Split", step["pattern"].get("Regex")))
            case other:
                steps.append((other,))
    return steps


def _space_first(described: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer prepends a space to the text."""
    found = json.dumps([described["normalizer"], described["pre_tokenizer"]], ensure_ascii=False)
    return '"Prepend"' in found or '"prepend_scheme": "first"' in found or '"prepend_scheme": "always"' in found


def _tokens(tokenizer: Any, size: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """All tokens by id and their types, with fillers for surplus rows of the embedding."""
    known = {token: number for token, number in tokenizer.get_vocab().items() if number < size}
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    for token, number in known.items():
        tokens[number] = token
        kinds[number] = TokenType.BYTE if sentencepiece and _is_byte(token) else TokenType.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        if number >= size:
            continue
        kinds[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        tokens[number] = added.content.replace(_SPACE, " ") if sentencepiece else added.content
    unknown = tokenizer.unk_token_id
    if sentencepiece and unknown is not None:
        kinds[unknown] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in kinds]


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
