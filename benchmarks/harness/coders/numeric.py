"""Compressors for arrays of numbers: pcodec, Blosc2, ZipNN."""

from __future__ import annotations

import importlib
import importlib.metadata

import numpy as np

from .coder import Absent, Array
from .streams import StreamCoder

__all__ = ["blosc_coder", "pcodec_coder", "zipnn_coder"]


def pcodec_coder() -> StreamCoder:
    """pcodec (Loncaric et al. 2025): bins of the values' own distribution, tANS, offsets."""
    try:
        library = importlib.import_module("pcodec")
    except ImportError as error:
        raise Absent("pip install pcodec") from error
    level = 12
    standalone = library.standalone
    config = library.ChunkConfig(compression_level=level, enable_8_bit=True)
    return StreamCoder(
        "pcodec",
        f"pcodec {importlib.metadata.version('pcodec')}, level {level} (highest), mode auto",
        lambda a: bytes(standalone.simple_compress(a, config)),
        lambda data, dtype, n: np.asarray(standalone.simple_decompress(data)),
    )


def blosc_coder() -> StreamCoder:
    """Blosc2: bits of equal weight together, then zstd."""
    try:
        blosc2 = importlib.import_module("blosc2")
    except ImportError as error:
        raise Absent("pip install blosc2") from error
    blosc2.set_nthreads(1)

    def pack(a: Array) -> bytes:
        parameters = blosc2.CParams(
            codec=blosc2.Codec.ZSTD,
            clevel=9,
            typesize=a.itemsize,
            filters=[blosc2.Filter.BITSHUFFLE],
            filters_meta=[0],
            nthreads=1,
        )
        packed: bytes = blosc2.compress2(a, cparams=parameters)
        return packed

    return StreamCoder(
        "blosc2",
        f"blosc2 {blosc2.__version__}, bitshuffle + zstd, level 9, one thread",
        pack,
        lambda data, dtype, n: np.frombuffer(blosc2.decompress2(data), dtype),
    )


def zipnn_coder() -> StreamCoder:
    """ZipNN (Hershcovitch et al. 2024): Huffman over groups of bytes, made for floats."""
    try:
        library = importlib.import_module("zipnn")
    except ImportError as error:
        raise Absent(f"pip install zipnn ({error})") from error
    codec = library.ZipNN(input_format="byte", bytearray_dtype="float32", threads=1)

    return StreamCoder(
        "zipnn",
        f"zipnn {importlib.metadata.version('zipnn')}, float32, one thread",
        lambda a: bytes(codec.compress(bytearray(a.tobytes()))),
        lambda data, dtype, n: np.frombuffer(codec.decompress(data), dtype),
        floats_only=True,
    )
