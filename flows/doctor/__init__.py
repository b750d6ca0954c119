"""Find problems in a checkout and repair them."""
