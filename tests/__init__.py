"""Tests: unit for pure functions, functional for the pipeline on real tools, gpu for what needs one."""
