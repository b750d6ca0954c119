"""Find problems of a checkout, and repair it."""
