"""AWQ (arXiv 2306.00978): channels that matter are scaled up before the weights are rounded to 4 bits."""

from __future__ import annotations

from tasks.quantizers import QuantizeJob
from tasks.quantizers.grouped import FORMS, Rounding, press_grouped, uniform
from tasks.settings import AwqSettings

DAMPING = 0.05  # where GPTQ does the rounding


def press(job: QuantizeJob) -> None:
    """Search scales and clips layer by layer on the Gram matrices, and round."""
    variant = job.variant
    assert isinstance(variant, AwqSettings)  # the method named this module
    form = FORMS[variant.format]
    grid = form.grid(variant.bits, variant.group_size, False, job.dtype)
    how = Rounding(
        scale=True,
        clip=variant.clip,
        gptq=variant.rounding == "gptq",
        act_order=True,
        damping=DAMPING,
        refine=variant.refine,
        propagate=variant.propagate,
    )
    press_grouped(job, form, uniform(job, grid, []), how, [])
