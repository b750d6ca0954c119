"""Quantization by libraries (`backend` in params.yaml), which our quantizer is measured against."""
