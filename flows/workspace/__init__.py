"""A run's checkout: worktree, locks, git and DVC's remote."""
