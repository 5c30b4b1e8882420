"""What the papers say of Golomb codes."""

from __future__ import annotations

from prunecast.compression.schemes.bitcodes import rice_parameter

__all__ = ["expected_bits"]


def expected_bits(density: float, parameter: int | None = None) -> float:
    """``b + 1 / (1 - (1 - p)**(2**b))``: expected bits for the position of one non-zero."""
    b = rice_parameter(density) if parameter is None else parameter
    return b + 1 / (1 - (1 - density) ** (1 << b))
