"""A Flower app whose nodes get into trouble, one round after the other."""
