"""Tests: `unit` for pure functions, `functional` for the pipeline with real tools, `gpu` for tests that need a GPU."""
