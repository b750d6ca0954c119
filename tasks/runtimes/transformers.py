"""The runtime `transformers`: Hugging Face models and compressed ones, on a CPU or a GPU.

compressed-tensors and GGUF models are decompressed on loading, others by tasks/runtimes/dense.py: the arithmetic
of the format is exact, but no 4-bit kernel runs. W8A8 models multiply integers on a CPU (tasks/runtimes/w8a8.py).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.offload import remove_dispatch
from compressed_tensors.quantization import QuantizationStatus
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    PreTrainedTokenizerBase,
)

from tasks.device import compute_device
from tasks.formats import load_format
from tasks.hardware import processor_name
from tasks.runtimes import Question, RuntimeInfo, Score
from tasks.runtimes.batches import batches
from tasks.runtimes.dense import load_dense
from tasks.runtimes.w8a8 import use_integers


class TransformersRuntime:
    """See the protocol `Runtime`."""

    libraries = ("compressed-tensors",)

    def __init__(self, directory: Path, dtype: str) -> None:
        transformers.utils.logging.disable_progress_bar()
        device = compute_device()
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        method = config.get("quantization_config", {}).get("quant_method")
        self.model: Any = _load(directory, getattr(torch, dtype), method).to(device).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        self.info = RuntimeInfo(
            "transformers", transformers.__version__, device, dtype, torch.get_num_threads(), processor_name()
        )
        integers = device == "cpu" and use_integers(self.model)
        self.fast = method is None or integers
        self.note = (
            None
            if self.fast
            else f"transformers has no fast {method} kernel here: it computes with dequantized weights"
        )

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """Scores of every continuation; all continuations of a context share its forward pass (see `_Tree`)."""
        results: list[list[Score]] = [[] for _ in questions]
        with tqdm(total=len(questions), desc=progress, unit="item", disable=not progress) as bar:
            for batch in batches(questions, batch_tokens):
                for index, scores in zip(batch, self._score([questions[i] for i in batch]), strict=True):
                    results[index] = scores
                bar.update(len(batch))
        return results

    @torch.inference_mode()
    def _score(self, questions: list[Question]) -> list[list[Score]]:
        trees = [_Tree(question) for question in questions]
        longest = max(len(tree.ids) for tree in trees)
        ids = torch.zeros(len(trees), longest, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        # padding sees itself alone: a row of the mask that is all False has no softmax
        mask = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1, 1)
        for row, tree in enumerate(trees):
            size = len(tree.ids)
            ids[row, :size] = torch.tensor(tree.ids)
            positions[row, :size] = torch.tensor(tree.positions)
            mask[row, 0, :size, :size] = tree.mask
        device = self.model.device
        hidden = self.model.base_model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask.to(device),
            use_cache=False,
        ).last_hidden_state
        results = []
        for row, tree in enumerate(trees):
            # the output layer costs a fifth of a small model: it runs where a token is scored, and there alone
            logits = self.model.get_output_embeddings()(hidden[row, tree.reads]).float().log_softmax(-1)
            targets = torch.tensor(tree.targets, device=logits.device)
            chosen = logits.gather(1, targets[:, None])[:, 0].cpu()
            greedy = (logits.argmax(-1) == targets).cpu()
            results.append([Score(chosen[span].sum().item(), bool(greedy[span].all())) for span in tree.spans])
        return results

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
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        out = self.model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=_pad(self.tokenizer)
        )
        return str(self.tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def _load(directory: Path, dtype: torch.dtype, method: str | None) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if method and not load_format(method).native:
        return load_dense(directory, dtype)
    if method == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if packed := sorted(directory.glob("*.gguf")):
        options["gguf_file"] = packed[0].name
    with warnings.catch_warnings(record=True):  # that only this option is heeded, the rest is the model's own
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
    for module in model.modules():
        if getattr(module, "quantization_status", None) is not None:
            # the weights lie on their grid; rounding them to it again at each call would cost time and change nothing
            module.quantization_status = QuantizationStatus.COMPRESSED
    # without this a layer sends what it reads to the processor that loaded it, and computes there, wherever it is moved
    return remove_dispatch(model)


def _pad(tokenizer: Any) -> int:
    """A token to fill with; which one does not matter, filled places are masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


class _Tree:
    """A question as one sequence: the context, then each continuation as a branch that sees the context and itself.

    ids, positions: of the sequence. mask: bool [tokens, tokens]. reads: the places whose output scores a token,
    targets: that token; spans: each continuation's slice of the two.
    The last token of a continuation is scored but never read on from, so it is not in the sequence.
    """

    def __init__(self, question: Question) -> None:
        start = len(question.context)
        self.ids = list(question.context)
        self.positions = list(range(start))
        self.reads: list[int] = []
        self.targets: list[int] = []
        self.spans: list[slice] = []
        size = start + sum(len(c) - 1 for c in question.continuations)
        self.mask = torch.zeros(size, size, dtype=torch.bool)
        self.mask[:start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
        for continuation in question.continuations:
            at, length = len(self.ids), len(continuation) - 1
            self.ids += continuation[:-1]
            self.positions += range(start, start + length)
            self.mask[at : at + length, :start] = True
            self.mask[at : at + length, at : at + length] = torch.ones(length, length, dtype=torch.bool).tril()
            self.spans.append(slice(len(self.targets), len(self.targets) + len(continuation)))
            self.reads += [start - 1, *range(at, at + length)]
            self.targets += continuation
