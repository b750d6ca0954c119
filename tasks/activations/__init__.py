"""What each layer reads: Gram matrices, magnitudes, the weights of tokens."""
