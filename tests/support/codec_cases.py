"""Tensors and contexts that take every path of the codec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from prunecast.compression.codec import Context, TensorSpec, encoder

__all__ = ["cases", "forced"]


@contextmanager
def forced(
    *, depth: int | None = None, lanes: bool = False, static: bool = False
) -> Iterator[None]:
    """Make encoders choose neighbour contexts of a depth, lane segments, or static tables."""
    plan = encoder.plan_field

    def planned(f: Any, *args: Any, **options: Any) -> Any:
        code = plan(f, *args, **options)
        if depth is not None and f.plane is None and f.mask is None and not f.conditioned:
            code.depth = depth if f.bits == 32 else 0
        return code

    changes: dict[str, Any] = {"plan_field": planned}
    if lanes:
        changes["_SERIAL_SYMBOLS"] = 0
    if static:
        changes["_STATIC"] = 1
    with mock.patch.multiple(encoder, **changes):
        yield


def cases() -> dict[str, tuple[dict[str, Any], Context]]:
    """Name to tensors and context."""
    rng = np.random.default_rng(11)
    scale = np.exp(rng.normal(size=(120, 1))) * np.exp(rng.normal(size=(1, 250)))
    big = np.rint(rng.laplace(size=(120, 250)) * scale * 3).astype("i4")
    sparse = (big * (rng.random(big.shape) < 0.05)).astype("i4")
    smooth = np.rint(np.cumsum(rng.normal(size=(100, 300)), 1)).astype("i2")
    mask = rng.random(big.shape) < 0.3
    near = (rng.normal(size=(60, 70)) * 0.1).astype("f4")
    spec = {"w": TensorSpec(np.dtype("i4"), sparse.shape)}
    exponents = rng.integers(0, 62, (90, 1))
    wide = (rng.laplace(size=(90, 200)) * 2.0**exponents).clip(-(2.0**62), 2.0**62).astype("i8")
    many: dict[str, Any] = {}
    for i in range(12):
        size = 10.0 ** rng.uniform(-1, 2)
        many[f"layer{i}.weight"] = (rng.normal(size=(60, 70)) * size).astype("i4")
        many[f"layer{i}.bias"] = (rng.normal(size=60) * size).astype("i2")
        many[f"layer{i}.mean"] = rng.normal(size=60).astype("f4")
        many[f"layer{i}.thin"] = (rng.integers(-3, 4, 900) * (rng.random(900) < 0.03)).astype("i1")
    many["zeros"] = np.zeros((50, 50), "i4")
    many["wide"] = wide[:3]
    integers = [np.dtype(d) for d in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    widths: dict[str, Any] = {}
    for d in integers:
        low, high = (0, 1) if d.kind == "b" else (np.iinfo(d).min, np.iinfo(d).max)
        widths[f"any {d}"] = rng.integers(low, high, (6, 40), "u1" if d.kind == "b" else d, True)
        widths[f"any {d}"] = widths[f"any {d}"].astype(d)
        widths[f"ends {d}"] = np.array([[low, 0, 1], [high, low, 1]], d)
        widths[f"all {d}"] = np.full(5, high, d)
    halves = (rng.normal(size=(40, 50)) * 0.1).astype("f2")
    specials = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, 1 / 3])
    noise = np.frombuffer(rng.bytes(4 * 3000), "f4")
    shapes = {"none": np.zeros((3, 0, 2), "i4"), "scalar": np.array(-7), "é": np.ones((1, 5), "?")}
    few = rng.integers(-9, 9, (40, 24))
    copies = few[rng.integers(0, 40, 500)] * (rng.random((500, 1)) < 0.6)
    return {
        "nothing": ({}, Context()),
        "copied rows": (
            {str(d): (copies % 2 if d.kind == "b" else copies).astype(d) for d in integers},
            Context(),
        ),
        "shapes": (shapes, Context()),
        "dense": ({"w": big}, Context()),
        "sparse": ({"w": sparse, "v": big[0]}, Context()),
        "smooth": ({"w": smooth, "v": smooth[0]}, Context()),
        "wide": ({"w": wide, "v": wide.view("u8")[:7], "u": wide[0].astype("i4")}, Context()),
        "one sign": ({"w": (np.abs(big) + 900).astype("u2")}, Context()),
        "many": (many, Context()),
        "widths": (widths, Context()),
        "floats": ({"f4": near, "f2": halves, "f8": specials, "noise": noise}, Context()),
        "floats near": (
            {"f4": np.nextafter(near, np.float32(1)), "f2": halves, "f8": specials},
            Context(previous={"f4": near, "f2": halves.T.reshape(40, 50), "f8": specials[::-1]}),
        ),
        "delta": ({"w": sparse}, Context(layout=spec, previous={"w": big})),
        "cancelled": ({"w": -big * (big % 3 == 0)}, Context(previous={"w": big.astype("i8")})),
        "masked": ({"w": big * mask, "f": near}, Context(mask={"w": mask, "f": near != 0})),
        "masked delta": (
            {"w": (sparse * mask).astype("i4")},
            Context(layout=spec, mask={"w": mask}, previous={"w": wide[0, 0] + big}),
        ),
    }
