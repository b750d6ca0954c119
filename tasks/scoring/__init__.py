"""Evaluation: lm-eval's tasks and divergence, in any runtime."""
