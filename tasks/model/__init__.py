"""The model itself: its layers, linear layers, size, and what fits it."""
