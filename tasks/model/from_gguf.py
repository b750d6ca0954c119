"""Convert a GGUF file to safetensors: dequantize its tensors, and write its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import TaskError, first_line
from tasks.sources.files import require_space
from tasks.tensor_files import BYTES, DTYPES
from tasks.text import pretokenizer_rules

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import PreTokenizer

Grid = dict[str, int | bool]

# the grids of these types: rounding to the same grid loses nothing
_GRIDS: dict[str, Grid] = {
    "Q4_0": {"bits": 4, "group_size": 32, "symmetric": True},
    "Q4_1": {"bits": 4, "group_size": 32, "symmetric": False},
    "Q8_0": {"bits": 8, "group_size": 32, "symmetric": True},
}
_FULL = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Quantized:
    """The original quantization of a model: the type of most weights (None: full precision), and its grid."""

    type: str | None = None
    grid: Grid | None = None
    licence: str | None = None


def dequantize(path: Path, destination: Path, dtype: str) -> Quantized:
    """Write the model in the GGUF file at `path` to the folder `destination` in `dtype`, with its tokenizer.

    The whole model is held in memory. TaskError if the file is damaged, or transformers does not read its kind of model
    or tokenizer correctly. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    reader = _read(path)
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise TaskError(
            f"{path.name} is one of {int(parts.contents())} parts of a GGUF file; the other tensors would be random. "
            "Merge the parts with llama.cpp's llama-gguf-split --merge, or use the model's safetensors"
        )
    count: Counter[str] = Counter()
    for tensor in reader.tensors:
        count[tensor.tensor_type.name] += int(tensor.n_elements)
    if not count:
        raise TaskError(f"{path.name} holds no tensors; expected a GGUF file of a whole model")
    require_space(destination, count.total() * BYTES[DTYPES[dtype]], f"dequantizing {path.name}")
    splitter = _splitter(reader, path.name)
    folder, name = path.parent, path.name
    try:
        with _parsed_once(reader):
            config = AutoConfig.from_pretrained(folder, gguf_file=name)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, config=config)
            _check_rotary(reader, config, name)
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, config=config, dtype=getattr(torch, dtype), output_loading_info=True
            )
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = first_line(error)
        raise TaskError(f"transformers cannot read {name}: {reason}; use the model's safetensors") from error
    model, loaded = found
    missing = sorted({*loaded["missing_keys"], *(one[0] for one in loaded["mismatched_keys"])})
    if missing := [one for one in missing if one not in (model.all_tied_weights_keys or {})]:
        raise TaskError(
            f"{name} does not give transformers {missing[0]}"
            + f" and {len(missing) - 1} more" * (len(missing) > 1)
            + f" of the {config.model_type} model, which would be random; use the model's safetensors"
        )
    _fix(tokenizer, reader, splitter)
    # already dequantized, but the loaded model is marked as quantized and refuses to be saved
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    most = count.most_common(1)[0][0]
    return Quantized(None if most in _FULL else most, _GRIDS.get(most), _field(reader, "general.license"))


def _read(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise TaskError(f"{path.name} is not a complete GGUF file ({error}); fetch it again") from error


def _check_rotary(reader: GGUFReader, config: Any, name: str) -> None:
    """TaskError if the file scales its rotary frequencies in a way that transformers does not read."""
    read = getattr(config, "rope_parameters", None) or {}
    scaling = _field(reader, f"{_field(reader, 'general.architecture')}.rope.scaling.type")
    factors = [one.name for one in reader.tensors if one.name.startswith(("rope_freqs", "rope_factors"))]
    if (factors or scaling not in (None, "none")) and read.get("rope_type", "default") == "default":
        raise TaskError(
            f"{name} scales its rotary frequencies ({', '.join(factors) or scaling}), which transformers does not read "
            "from a GGUF file; use the model's safetensors"
        )


@contextmanager
def _parsed_once(reader: GGUFReader) -> Iterator[None]:
    """Make transformers reuse `reader`: otherwise it parses the whole file four times, seconds each."""
    import gguf

    published = gguf.GGUFReader
    gguf.GGUFReader = lambda path: reader  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        gguf.GGUFReader = published  # type: ignore[misc]


def _field(reader: GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    return found.contents() if found else None


def _splitter(reader: GGUFReader, name: str) -> PreTokenizer | None:
    """The pre-tokenizer of a llama's byte-level tokenizer; None where transformers handles it.

    The names and expressions are llama.cpp's (src/llama-vocab.cpp).
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if _field(reader, "general.architecture") != "llama" or _field(reader, "tokenizer.ggml.model") != "gpt2":
        return None
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    match _field(reader, "tokenizer.ggml.pre"):
        case "smollm":
            return Sequence([Digits(individual_digits=True), gpt2])
        case "llama-bpe" | "llama3":
            return Sequence(
                [
                    Split(Regex(pretokenizer_rules.LLAMA3), "isolated"),
                    ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        case None | "gpt-2" | "gpt2" | "default":
            return gpt2
        case other:
            raise TaskError(
                f"{name} has llama.cpp's pre-tokenization {other!r}, which is not supported here: the model "
                "would get other tokens than it was trained on; use its safetensors"
            )


def _fix(tokenizer: Any, reader: GGUFReader, splitter: PreTokenizer | None) -> None:
    """Fix what transformers 5.17 gets wrong: the last token of a text, padding, and the pre-tokenization rule."""
    from tokenizers import decoders, processors

    for key, name in {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}.items():
        number = _field(reader, f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(number)))
    length = _field(reader, f"{_field(reader, 'general.architecture')}.context_length")
    if length is not None:
        tokenizer.model_max_length = int(length)
    if splitter is None:
        return
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    # the clean-up would remove spaces from decoded text
    tokenizer.clean_up_tokenization_spaces = False
    bos = tokenizer.bos_token if _field(reader, "tokenizer.ggml.add_bos_token") else None
    backend.post_processor = (
        processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokenizer.bos_token_id)])
        if bos
        else processors.ByteLevel(trim_offsets=False)
    )
