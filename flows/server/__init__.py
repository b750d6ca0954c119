"""Prefect's server and web pages on this machine."""
