"""Developers' tools; no part of a run."""
