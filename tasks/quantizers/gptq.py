"""GPTQ (arXiv 2210.17323): 4-bit weights in groups, each column's rounding error made good by the next columns."""

from __future__ import annotations

from tasks.quantizers import QuantizeJob
from tasks.quantizers.grouped import FORMS, Rounding, press_grouped, uniform
from tasks.settings import GptqSettings


def press(job: QuantizeJob) -> None:
    """Solve every layer on the Gram matrices of its inputs."""
    variant = job.variant
    assert isinstance(variant, GptqSettings)  # the method named this module
    form = FORMS[variant.format]
    grid = form.grid(variant.bits, variant.group_size, variant.symmetric, job.dtype)
    how = Rounding(
        scale=False,
        clip=variant.clip,
        gptq=True,
        act_order=variant.act_order == "static",
        damping=variant.damping,
        refine=variant.refine,
        propagate=variant.propagate,
    )
    press_grouped(job, form, uniform(job, grid, variant.skip_layers), how, variant.skip_layers)
