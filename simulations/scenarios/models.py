"""The demo's network under the name by which finished runs know it."""

from prunecast.simulations.networks.convolutional import digits_cnn

__all__ = ["digits_cnn"]
