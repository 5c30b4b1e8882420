"""Pruning of a torch module that trains: masks held, statistics measured; needs torch."""
