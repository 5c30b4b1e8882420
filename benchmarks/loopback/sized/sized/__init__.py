"""A Flower app whose messages have the size that is asked for."""
