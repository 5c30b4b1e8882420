"""A small classifier and an empty repository."""

from support.releases import graph, images, keys, model, repository

__all__ = ["graph", "images", "keys", "model", "repository"]
