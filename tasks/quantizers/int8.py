"""INT8, W8A8: SmoothQuant (arXiv 2211.10438), then weights rounded per output channel, activations per token.

Beside the norms, of which the paper speaks, the layer before smooths what the layer after it reads, as in AWQ.
"""

from __future__ import annotations

from torch import Tensor

from tasks.formats.compressed import bytes_config, pack_bytes
from tasks.quantizers import QuantizeJob
from tasks.quantizers.layerwise import Layer, left_alone, press_layers
from tasks.settings import Int8Settings
from tasks.solvers import gptq, rtn
from tasks.solvers.smoothquant import INT8, smooth

DAMPING = 0.3  # of GPTQ: errors this small are soon those of the calibration text alone


def press(job: QuantizeJob) -> None:
    """Move the activations' outliers into the weights, then round the weights to 8 bits."""
    variant = job.variant
    assert isinstance(variant, Int8Settings)  # the method named this module
    dtype = job.dtype

    def press_layer(layer: Layer) -> dict[str, dict[str, Tensor]]:
        for source, linears in layer.scalable():
            known = layer.inputs[linears[0]]
            factor = smooth(layer.stacked(linears), known.gram, known.largest, variant.smoothing)
            layer.scale_input(source, linears, factor, dtype)
        packed: dict[str, dict[str, Tensor]] = {}
        for linears, known in layer.readers():
            weight = layer.stacked(linears)
            if variant.rounding == "gptq":
                solved = gptq.solve(weight, known.gram, INT8, act_order=True, damping=DAMPING)
            else:
                solved = rtn.solve(weight, INT8)
            packed |= {linear: pack_bytes(part) for linear, part in layer.split(solved, linears)}
        return packed

    config = bytes_config(variant.symmetric_activations, left_alone(variant.skip_layers))
    press_layers(job, press_layer, config, dtype, variant.skip_layers, press)
