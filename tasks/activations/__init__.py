"""Statistics of each layer's inputs: Gram matrices, magnitudes, token weights."""
