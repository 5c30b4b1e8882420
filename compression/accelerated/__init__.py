"""The codec's payloads, made and read by torch on any device: the same bytes, the same values.

What it does on which device, and what it costs: ``docs/accelerated.md``.
"""

from .decoder import decode
from .encoder import encode
from .lattice import dequantise, quantise

__all__ = ["decode", "dequantise", "encode", "quantise"]
