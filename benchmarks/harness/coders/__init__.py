"""The codec and its peers, each with the best sensible settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .coder import Absent, Bound, Coder, NotApplicable
from .entropy import ans_coder
from .general import bitmap_coder, gap_coder, zlib_coder, zstd_coder
from .nnc import nnc_coder
from .numeric import blosc_coder, pcodec_coder, zipnn_coder
from .ours import OURS, Ours, sections

__all__ = [
    "NAMES",
    "OURS",
    "Absent",
    "Bound",
    "Coder",
    "NotApplicable",
    "load_coders",
    "sections",
]

_MAKERS: dict[str, Callable[[], Coder]] = {
    OURS: Ours,
    "zlib -6": zlib_coder,
    "zstd -3": lambda: zstd_coder(3),
    "zstd -19": lambda: zstd_coder(19),
    "bitmap + zstd": bitmap_coder,
    "gaps + zstd": gap_coder,
    "blosc2": blosc_coder,
    "pcodec": pcodec_coder,
    "zipnn": zipnn_coder,
    "static ANS": ans_coder,
    "NNCodec": nnc_coder,
}
NAMES = tuple(_MAKERS)
"""All coders, ours first."""


def load_coders(wanted: Sequence[str] = ()) -> tuple[list[Coder], dict[str, str]]:
    """Coders that can run here, and why the others cannot.

    Args:
        wanted: parts of names; all if empty. Ours is always there.
    """
    found: list[Coder] = []
    absent: dict[str, str] = {}
    for name, make in _MAKERS.items():
        if wanted and name != OURS and not any(w.lower() in name.lower() for w in wanted):
            continue
        try:
            found.append(make())
        except Absent as error:
            absent[name] = str(error)
    return found, absent
