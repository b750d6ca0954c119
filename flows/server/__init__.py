"""Prefect's server and pages on this machine."""
