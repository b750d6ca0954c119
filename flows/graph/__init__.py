"""Decisions over dvc.yaml, params.yaml and dvc.lock; nothing here runs a stage."""
