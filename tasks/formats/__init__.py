"""How a quantized layer is written down: one module per format on disk.

A packer is a pure function from a solved weight to the tensors that stand for it, by the end of their names. Beside it
is what config.json says of the format, its `quantization_config`.
"""
