"""INT8, W8A8: SmoothQuant (arXiv 2211.10438), then weights rounded per output channel, activations per token.

Beside the norms, of which the paper speaks, the layer before smooths what the layer after it reads, as in AWQ.
"""

from __future__ import annotations

from torch import Tensor

from tasks.formats.compressed import bytes_config, pack_bytes
from tasks.quantizers import Job
from tasks.quantizers.layerwise import Layer, left_alone, press_layers
from tasks.settings import Int8Settings
from tasks.solvers import rtn
from tasks.solvers.smoothquant import INT8, smooth


def press(job: Job) -> None:
    """Move the activations' outliers into the weights, then round the weights to 8 bits."""
    variant = job.variant
    assert isinstance(variant, Int8Settings)  # the method named this module
    dtype = job.dtype

    def press_layer(layer: Layer) -> dict[str, dict[str, Tensor]]:
        for source, linears in layer.scalable():
            factor = smooth(layer.stacked(linears), layer.inputs[linears[0]].largest, variant.smoothing)
            layer.scale_input(source, linears, factor, dtype)
        return {linear: pack_bytes(rtn.solve(layer.weight(linear), INT8)) for linear in layer.inputs}

    config = bytes_config(variant.symmetric_activations, left_alone(variant.skip_layers))
    press_layers(job, press_layer, config, dtype, variant.skip_layers)
