"""The variable-length codes of the papers, vectorised: Golomb (Rice) and Elias omega.

Bit 7 of a byte comes first, as the codes are written in the papers. A codeword's start follows
from the one before, so decoding computes for every bit where a codeword that began there would
end, and then follows that chain from the first bit.
"""

from .bits import BitView, pack_fields
from .elias import decode_omega, encode_omega, omega_lengths, walk
from .golomb import decode_gaps, encode_gaps, expected_bits, rice_parameter

__all__ = [
    "BitView",
    "decode_gaps",
    "decode_omega",
    "encode_gaps",
    "encode_omega",
    "expected_bits",
    "omega_lengths",
    "pack_fields",
    "rice_parameter",
    "walk",
]
