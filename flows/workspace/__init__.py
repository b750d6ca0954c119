"""Checkouts, git and DVC around a run."""
