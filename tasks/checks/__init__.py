"""Checks before any work starts, and of the finished bundle."""
