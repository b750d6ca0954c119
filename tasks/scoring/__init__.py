"""Evaluation with lm-eval tasks and divergence from the baseline, in any runtime."""
