"""Files that serve one version of a model, or two with their shares of the requests, from the bundles of finished runs.

This is no orchestrator: compose or Kubernetes does what the files say.
"""
