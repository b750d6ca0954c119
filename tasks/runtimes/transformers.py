"""The runtime `transformers`: Hugging Face models and compressed ones, on a CPU or a GPU.

compressed-tensors and GGUF models are decompressed on loading, others by tasks/runtimes/dense.py: the arithmetic
of the format is exact, but no 4-bit kernel runs. W8A8 models multiply integers on a CPU (tasks/runtimes/w8a8.py).
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.offload import remove_dispatch
from compressed_tensors.quantization import QuantizationStatus
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CompressedTensorsConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from tasks.device import compute_device
from tasks.hardware import peak_memory, processor_name
from tasks.model.skeleton import model_class
from tasks.runtimes import Question, RuntimeInfo, Score
from tasks.runtimes.batches import batches
from tasks.runtimes.dense import load_dense, needs_own_reader
from tasks.runtimes.plain_passes import score_plainly
from tasks.runtimes.shared_context import score_shared
from tasks.runtimes.shared_proof import longest_shared
from tasks.runtimes.w8a8 import use_integers
from tasks.text.bos import prompt_ids


class TransformersRuntime:
    """See the protocol `Runtime`."""

    def __init__(self, directory: Path, dtype: str) -> None:
        transformers.utils.logging.disable_progress_bar()
        device = compute_device()
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        method = config.get("quantization_config", {}).get("quant_method")
        self.model: Any = _load(directory, getattr(torch, dtype), method).to(device).eval()
        self.model.generation_config = _greedy(self.model.generation_config)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        self.info = RuntimeInfo(
            "transformers", transformers.__version__, device, dtype, torch.get_num_threads(), processor_name()
        )
        self.libraries: Mapping[str, str] = {"compressed-tensors": version("compressed-tensors")}
        self._said = False
        integers = device == "cpu" and use_integers(self.model)
        self.fast = method is None or integers
        self.note = (
            None
            if self.fast
            else f"transformers has no fast {method} kernel here: it computes with dequantized weights"
        )

    @property
    def peak_memory_bytes(self) -> int:
        """See `Runtime`."""
        return peak_memory(self.info.device)

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """Score every continuation. Those of a context share the pass over it where that is proven on this model, once
        per loaded model (tasks/runtimes/shared_proof.py); elsewhere each has a plain pass of its own."""
        longest, why = self._longest_shared
        shared = [i for i, question in enumerate(questions) if _length(question) <= longest]
        plain = [i for i, question in enumerate(questions) if _length(question) > longest]
        if plain and not self._said:
            self._said = True
            tqdm.write(f"{len(plain)} of {len(questions)} questions are scored in plain passes: {why}", sys.stderr)
        results: list[list[Score]] = [[] for _ in questions]
        with tqdm(total=len(questions), desc=progress, unit="item", disable=not progress) as bar:
            asked = [questions[i] for i in shared]
            for batch in batches(asked, batch_tokens):
                for place, scores in zip(batch, score_shared(self.model, [asked[i] for i in batch]), strict=True):
                    results[shared[place]] = scores
                bar.update(len(batch))
            found = score_plainly(self.model, [questions[i] for i in plain], batch_tokens, bar.update)
            for index, scores in zip(plain, found, strict=True):
                results[index] = scores
        return results

    @cached_property
    def _longest_shared(self) -> tuple[float, str]:
        return longest_shared(self.model)

    @torch.inference_mode()
    def logprobs(self, ids: Tensor) -> Tensor:
        """See `Runtime`."""
        logits: Tensor = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
        return logits.float().log_softmax(-1)

    def logprobs_and_states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `RuntimeWithStates`."""
        seen: list[Any] = []
        hook = self.model.base_model.register_forward_hook(lambda module, given, found: seen.append(found))
        try:
            logprobs = self.logprobs(ids)
        finally:
            hook.remove()
        return logprobs, getattr(seen[0], "last_hidden_state", None) if seen else None

    @torch.inference_mode()
    def generate_ids(self, ids: Tensor, new_tokens: int) -> Tensor:
        """See `Runtime`."""
        ids = ids.to(self.model.device)
        continued: Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=_pad(self.tokenizer),
        )
        return continued

    @torch.inference_mode()
    def generate(self, prompt: str, new_tokens: int) -> str:
        """See `Runtime`."""
        ids = torch.tensor([prompt_ids(self.tokenizer, prompt)], device=self.model.device)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=_pad(self.tokenizer),
        )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _greedy(own: GenerationConfig) -> GenerationConfig:
    """The model's special tokens alone: its other keys (penalties, bans, lengths) would change what is most likely, and
    `generate` takes what a call leaves out from the model."""
    return GenerationConfig(
        **{name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )


def _load(directory: Path, dtype: torch.dtype, method: str | None) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if method and needs_own_reader(directory, method):
        return load_dense(directory, dtype)
    if method == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if packed := sorted(directory.glob("*.gguf")):
        options["gguf_file"] = packed[0].name
    with warnings.catch_warnings(record=True):  # that only this option is heeded, the rest is the model's own
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, **{k: v for k, v in options.items() if k == "gguf_file"}
        )
        model = model_class(config).from_pretrained(directory, **options)
    for module in model.modules():
        if getattr(module, "quantization_status", None) is not None:
            # the weights lie on their grid; rounding them to it again at each call would cost time and change nothing
            module.quantization_status = QuantizationStatus.COMPRESSED
    # without this a layer sends what it reads to the processor that loaded it, and computes there, wherever it is moved
    return remove_dispatch(model)


def _pad(tokenizer: Any) -> int:
    """A token to fill with; which one does not matter, filled places are masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def _length(question: Question) -> int:
    """Tokens that the model reads to score the longest continuation of a question."""
    return len(question.context) + max(map(len, question.continuations)) - 1
