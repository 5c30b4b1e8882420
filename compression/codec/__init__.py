"""Tensors to bytes and back: numpy only, lossless, safe on hostile bytes."""
