"""The model: its layers, linear layers, size and compatible settings."""
