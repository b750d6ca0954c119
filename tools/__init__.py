"""Developer tools, not part of a run."""
