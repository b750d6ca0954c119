"""Compare our solvers with libraries: same model, tokens and settings, alternating (`make bench`)."""
