"""Whether Transformers loads a model's tokenizer as its tokenizer.json describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import TaskError
from tasks.output import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# spaces, line ends, digits, punctuation, contractions, other scripts, an emoji of several code points
PROBE = (
    "The capital of France is Paris.  It's  two  spaces,\n\n\ta tab; 12345 and 3.14!\r\n"
    "def f(x): return x**2  # naïve café ÄÖÜ\nПривет, 你好, こんにちは, שלום 👩‍💻 <b>end</b>   "
)
NEUTRAL = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it is


def check_tokenizer(folder: Path) -> list[str]:
    """Correct the class in tokenizer_config.json if it changes the tokens of tokenizer.json; the corrections.

    Transformers 5 replaces the pre-tokenizer by that of the named class: a byte-level tokenizer that is called
    LlamaTokenizerFast loses its spaces. TaskError if no class gives the tokens of tokenizer.json, or if the embedding
    has no row for a token.
    """
    file, path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.exists():
        return []
    if _load(folder)[1] == _own(file):
        return []
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    named = values.get("tokenizer_class") or _load(folder)[0]
    write_json(path, values | {"tokenizer_class": NEUTRAL})
    if _load(folder)[1] != _own(file):
        raise TaskError(
            f"Transformers' tokenizer ({named}) gives other tokens than tokenizer.json, also as {NEUTRAL}; every score "
            "would be of another text. Save the tokenizer again with Transformers 5, or choose another revision"
        )
    return [f"tokenizer_class set to {NEUTRAL}: {named} changes the tokens of tokenizer.json"]


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """TaskError if the embedding, with `rows` rows, has none for a token."""
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= rows:
        raise TaskError(
            f"the tokenizer has the token {token!r} with the id {vocabulary[token]}, but the embedding has only {rows} "
            "rows; use the tokenizer that belongs to the model"
        )


def _load(folder: Path) -> tuple[str, list[int]]:
    """The class that Transformers chooses, and its tokens of the probe."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return type(tokenizer).__name__, list(tokenizer(PROBE, add_special_tokens=False).input_ids)


def _own(file: Path) -> list[int]:
    """The tokens of the probe by tokenizer.json alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return list(tokenizer.encode(PROBE, add_special_tokens=False).ids)
