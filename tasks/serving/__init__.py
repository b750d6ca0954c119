"""Serve a model as its users will: the target's real server in an environment and a process of its own, over HTTP."""
