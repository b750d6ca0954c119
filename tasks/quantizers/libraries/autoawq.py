"""AWQ (arXiv 2306.00978) with autoawq: scale up salient channels before rounding the weights to 4 bits.

autoawq as published silently destroys a model on a CPU; `GramAwqQuantizer` fixes this and explains why.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # triton is for GPUs; autoawq would only import it, and it reports leaks when the process ends
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]

import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoTokenizer

from tasks.quantizers import QuantizeJob

with warnings.catch_warnings(record=True):  # a deprecation notice; our versions are pinned and tested
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

# Calibration samples per block run: bounds memory, no effect on the result beyond rounding.
PARALLEL_SAMPLES = 4
SCALE_GRID = 20


class GramAwqQuantizer(AwqQuantizer):
    """autoawq's quantizer with both searches on Gram matrices: correct on a CPU, and many times faster there.

    For a linear layer with inputs X, a weight change D causes the error ||X D^T||^2 = trace(D H D^T) with H = X^T X. So
    a trial of a scale or a clip needs only H, not a forward pass. autoawq's scale search changes the live weights and
    backs them up as `{k: v.cpu()}`; on a CPU, `.cpu()` is the weight itself and not a copy, so they are never restored.
    This search does not change the weights.
    """

    @torch.no_grad()
    def _compute_best_scale(
        self,
        x: Tensor,
        w_mean: Tensor,
        x_mean: Tensor,
        module2inspect: torch.nn.Module,
        linears2scale: list[torch.nn.Linear],
        fp16_output: Tensor,
        kwargs: Any = None,
    ) -> Tensor:
        """The scale per input channel, float [channels], that rounds `linears2scale` with the least output error."""
        gram = _gram(x)
        weight = torch.cat([linear.weight.float() for linear in linears2scale])
        x_mean, w_mean = x_mean.view(-1).float(), w_mean.view(-1).float()
        best_loss, best = float("inf"), torch.ones_like(x_mean)
        for step in range(SCALE_GRID):
            ratio = step / SCALE_GRID
            scales = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
            scales = scales / (scales.max() * scales.min()).sqrt()
            scales[~torch.isfinite(scales)] = 1
            change = self.pseudo_quantize_tensor(weight * scales)[0] / scales - weight
            loss = ((change @ gram) * change).sum().item()
            if loss < best_loss:
                best_loss, best = loss, scales
        return best.to(x.dtype).cpu()

    @torch.no_grad()
    def _compute_best_clip(
        self,
        w: Tensor,
        input_feat: Tensor,
        n_grid: int = 20,
        max_shrink: float = 0.5,
        n_sample_token: int = 512,
    ) -> Tensor:
        """The largest magnitude to keep per row and group, [rows, groups, 1], with the least output error."""
        size = self.group_size
        x = input_feat.reshape(-1, input_feat.shape[-1]).float()
        x = x.view(len(x), -1, size).transpose(0, 1)  # [groups, tokens, size]
        gram = torch.bmm(x.transpose(1, 2), x)
        weight = w.float().view(len(w), -1, size).transpose(0, 1)  # [groups, rows, size]
        largest = weight.abs().amax(-1, keepdim=True)
        best, least = largest.clone(), torch.full_like(largest, float("inf"))
        for step in range(int(max_shrink * n_grid)):
            limit = largest * (1 - step / n_grid)
            clipped = weight.clamp(-limit, limit).reshape(-1, size)
            change = self.pseudo_quantize_tensor(clipped)[0].view(weight.shape) - weight
            error = (torch.bmm(change, gram) * change).sum(-1, keepdim=True)
            best = torch.where(error < least, limit, best)
            least = torch.minimum(error, least)
        return best.transpose(0, 1).to(w.dtype)


def _gram(x: Tensor) -> Tensor:
    """X^T X in float32, accumulated by sample: [..., tokens, channels] -> [channels, channels]."""
    total = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
    for sample in x.reshape(-1, x.shape[-2], x.shape[-1]):
        total.addmm_(sample.float().T, sample.float())
    return total


def press_with_autoawq(job: QuantizeJob) -> None:
    """Search scales and clips block by block on the calibration tokens, round, and write AutoAWQ's GEMM format."""
    variant = job.variant
    keep_freed_memory()
    cpu = job.device == "cpu"
    transformers.utils.logging.disable_progress_bar()
    model = AutoAWQForCausalLM.from_pretrained(
        str(job.source),
        device_map=None,
        torch_dtype=torch.float32 if cpu else torch.float16,
        safetensors=True,
        trust_remote_code=False,
    )
    # autoawq collects garbage after every step: exclude the objects that exist now
    gc.freeze()
    model.quantize(
        AutoTokenizer.from_pretrained(job.source),
        quant_config={
            "zero_point": True,
            "q_group_size": variant.precision.group_size,
            "w_bit": variant.precision.bits,
            "version": "GEMM",
        },
        calib_data=job.tokens.tolist(),
        max_calib_samples=len(job.tokens),
        max_calib_seq_len=job.tokens.shape[1],
        apply_clip=variant.clip,
        n_parallel_calib_samples=PARALLEL_SAMPLES,
        quantizer_cls=GramAwqQuantizer,
    )
    gc.unfreeze()
    # the format's scales are float16, and so are unquantized tensors
    _save(model, job.destination)


def _save(model: Any, destination: Path) -> None:
    """Write weights and config.json. autoawq's save turns sampling on, and its bytes differ between runs."""
    inner = model.model.to(torch.float16)
    inner.config.dtype = torch.float16
    inner.config.use_cache = True
    inner.config.quantization_config = model.quant_config.to_transformers_dict()
    # a tied output layer is an alias of the embedding
    tied = {"lm_head.weight"} if inner.config.tie_word_embeddings else set()
    state = {name: tensor.contiguous() for name, tensor in inner.state_dict().items() if name not in tied}
    save_torch_state_dict(state, destination)
    inner.config.save_pretrained(destination)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor instead of returning it to the kernel.

    Without it, a search on a CPU spends more time on clearing fresh pages than on computing. No effect with other C
    libraries. Source: mallopt(3).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library other than glibc
        return
    largest = 2**31 - 1
    for parameter, value in (
        (-3, largest),
        (-1, largest),
        (-2, 256 * 2**20),
    ):  # mmap threshold, trim, top pad
        mallopt(parameter, value)
