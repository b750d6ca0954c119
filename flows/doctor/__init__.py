"""Find what is wrong with a checkout, and repair it."""
