"""Real payloads of every mode to start from: python -m fuzz.seeds FOLDER."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from prunecast.compression.codec import Context, encode, encoder
from prunecast.compression.codec.modelling.fields import Field

from .oracle import CONTEXTS, Mode

__all__ = ["main", "refused", "seeds"]

Tensors = dict[str, Any]


def _lanes(
    tensors: Tensors, context: Context, depth: int | None = None, *, static: bool = False
) -> bytes:
    """Encode with lane segments however few the symbols, and at the depth given."""
    plan = vars(encoder)["plan_field"]

    def planned(f: Field, *args: Any, **options: Any) -> Any:
        code = plan(f, *args, **options)
        if depth is not None and f.plane is None:
            code.depth = depth
        return code

    with (
        mock.patch.object(encoder, "plan_field", planned),
        mock.patch.object(encoder, "_SERIAL_SYMBOLS", 0),
        mock.patch.object(encoder, "_STATIC", 1 if static else 1000),
    ):
        return encode(tensors, context=context)


def _plain(rng: np.random.Generator) -> Iterator[Tensors]:
    yield {}
    for dtype in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
        t = np.dtype(dtype)
        low, high = (0, 1) if dtype == "?" else (np.iinfo(t).min, np.iinfo(t).max)
        yield {"w": np.array([[low, 0, 1], [high, low, 1]], t), "v": np.full(4, high, t)}
        yield {"w": np.asarray(rng.integers(0, 2, (5, 7)), t), "b": np.zeros((2, 2), t)}
    for dtype in ("f2", "f4", "f8"):
        yield {"w": (rng.normal(size=(4, 5)) * 0.1).astype(dtype), "s": np.array(-0.0, dtype)}
        yield {"w": np.array([np.nan, np.inf, -np.inf, -0.0, 0, 1]).astype(dtype)}
    yield {"a": np.zeros((3, 0, 2), "i4"), "b": np.zeros((2**61, 0), "i1"), "é": np.zeros(0, "f8")}
    yield {f"t{i}": np.array(i, "i2") for i in range(12)}
    scale = np.exp(rng.normal(size=(24, 1)) * 2) * np.exp(rng.normal(size=(1, 30)))
    yield {"w": np.rint(rng.laplace(size=(24, 30)) * scale).astype("i4")}
    yield {"w": (rng.laplace(size=(30, 40)) * (rng.random((30, 40)) < 0.04) * 9).astype("i2")}
    yield {
        "w": np.rint(np.cumsum(rng.normal(size=90))).astype("i4"),
        "x": np.arange(40, dtype="i1"),
    }
    for dtype in ("i1", "i4", "u8"):
        rows = rng.integers(0, 99, (9, 12)).astype(dtype)
        yield {"w": rows[np.where(rng.random(70) < 0.4, 8, rng.integers(0, 9, 70))]}
    yield {"w": rng.random((9, 12))[rng.integers(0, 9, 70)] < 0.5}
    yield {"w": rng.integers(-(2**62), 2**62, 12), "x": rng.integers(-9, 9, 30)}


def _with_context(index: int, rng: np.random.Generator) -> Iterator[Tensors]:
    """Tensors that fit one of the fixed contexts."""
    context = CONTEXTS[index]
    masks, held = context.mask or {}, context.previous or {}
    for density in (0.0, 0.1, 1.0):
        tensors: Tensors = {}
        if context.layout is not None:
            names = {n: (s.dtype, s.shape) for n, s in context.layout.items()}
        else:
            names = {n: (np.dtype("i4"), a.shape) for n, a in masks.items()}
            names |= {n: (a.dtype, a.shape) for n, a in held.items()}
        for name, (dtype, shape) in names.items():
            values = np.rint(rng.laplace(size=shape) * 3) * (rng.random(shape) < density)
            if name in held and density < 1:
                base = held[name]
                values = base + values if dtype.kind == "f" else np.where(values > 1, 0, values)
                if dtype.kind == "f" and density:
                    values = np.nextafter(base, base.dtype.type(1))
            with np.errstate(all="ignore"):
                array = np.asarray(values).astype(dtype)
            if name in held and dtype.kind != "f" and density == 0.1:
                array = np.where(rng.random(shape) < 0.3, -held[name].astype(dtype), array)
            if name in masks:
                array = np.where(masks[name], array, np.zeros((), dtype))
            tensors[name] = np.asarray(array, dtype)
        yield tensors


def seeds() -> list[bytes]:
    """Inputs from real payloads, in every context and mode."""
    rng = np.random.default_rng(7)
    out: list[bytes] = []
    for tensors in _plain(rng):
        payloads = {encode(tensors), _lanes(tensors, Context())}
        payloads.add(_lanes(tensors, Context(), static=True))
        for depth in (1, 2, 3):
            if all(np.asarray(v).dtype.itemsize < 8 for v in tensors.values()):
                payloads.add(_lanes(tensors, Context(), depth))
        out += [
            bytes([Mode(0, i % 5 == 4, i % 4).byte]) + p for i, p in enumerate(sorted(payloads))
        ]
    for index in range(1, len(CONTEXTS)):
        for i, tensors in enumerate(_with_context(index, rng)):
            context = CONTEXTS[index]
            payloads = {encode(tensors, context=context), _lanes(tensors, context, static=i == 1)}
            for payload in payloads:
                out.append(bytes([Mode(index, False, i).byte]) + payload)
    return sorted(set(out), key=lambda data: (len(data), data))


def refused() -> list[bytes]:
    """Inputs from the vectors that a decoder must refuse."""
    vectors = Path(__file__).parents[1] / "tests/compression/codec/vectors/must_fail"
    return [b"\0" + path.read_bytes() for path in sorted(vectors.glob("*.bin"))]


def main() -> None:
    """Write one file for each seed, and for each vector that must be refused."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for data in seeds() + refused():
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


if __name__ == "__main__":
    main()
