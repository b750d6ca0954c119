"""Our solvers and the libraries side by side: same model, tokens and settings, alternating (`make bench`)."""
