"""Servers and web UIs of Prefect and MLflow on this machine."""
