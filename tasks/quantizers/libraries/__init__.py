"""The same work by libraries (`backend` in params.yaml): what our own quantizer is measured against."""
