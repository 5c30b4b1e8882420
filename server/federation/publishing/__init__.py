"""Versions of the master: lattices, pruning, and what each node may be sent."""
