"""Prefect flows over the stages of dvc.yaml. Imports no torch."""
