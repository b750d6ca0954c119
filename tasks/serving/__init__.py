"""Servers with an OpenAI-compatible HTTP interface for exported models."""
