"""Write the golden and the must-fail vectors.

No test runs this. Run it by hand after a deliberate change of the format, and review the diff:
PYTHONPATH=.:tests python tests/compression/codec/make_vectors.py

Each golden vector is NAME.bin (the payload) and NAME.npz (tensors, and the context where there
is one); each must-fail vector is ERROR--CAUSE.bin, where ERROR is the class that must be raised.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from prunecast.compression.codec import Context, Limits, TensorSpec, encode, encoder
from prunecast.compression.codec.container.forms import write_copies, write_forms
from prunecast.compression.codec.container.head import write_specs
from prunecast.compression.codec.container.wire import seal, unseal
from prunecast.compression.codec.encoder import encode_body
from prunecast.compression.codec.entropy.adaptive import UINT_CONTEXTS, AdaptiveEncoder
from prunecast.compression.codec.entropy.packs import CODERS, Pack
from prunecast.compression.codec.modelling.copies import copied_fields
from prunecast.compression.codec.modelling.fields import fields_of
from prunecast.compression.codec.modelling.forms import (
    Equal,
    Lattice,
    Packed,
    Palette,
    all_fields,
)
from support.hostile import hostile, mismatched

FOLDER = Path(__file__).parent / "vectors"


def golden() -> dict[str, tuple[dict[str, Any], Context]]:
    """Tensors and context of every golden vector."""
    rng = np.random.default_rng(20240607)
    activity = np.exp(rng.normal(size=(160, 1))) * np.exp(rng.normal(size=(1, 240)))
    dense = np.rint(rng.laplace(size=(160, 240)) * activity * 4).astype(np.int32)
    smooth = np.cumsum(rng.normal(size=(120, 300)), axis=1)
    smooth = np.rint(np.where(np.abs(smooth) > 18, smooth - 18 * np.sign(smooth), 0))
    held = np.rint(rng.laplace(size=(100, 120)) * 6).astype(np.int32)
    held[np.abs(held) < 8] = 0
    delta = np.where(rng.random(held.shape) < 0.1, rng.integers(-1, 2, held.shape), 0)
    delta = np.where(rng.random(held.shape) < 0.02, -held, delta).astype(np.int32)
    mask = held != 0
    update = (rng.integers(-2, 3, held.shape) * (rng.random(held.shape) < 0.15) * mask).astype("i4")
    layout = {"w": TensorSpec(np.dtype(np.int32), held.shape)}
    widths = {
        str(d): rng.integers(np.iinfo(d).min, np.iinfo(d).max, (5, 4), dtype=d, endpoint=True)
        for d in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
    }
    floats = {
        "f2": (rng.normal(size=30) * 0.1).astype("f2"),
        "f4": (rng.normal(size=(20, 40)) * 0.1).astype("f4"),
        "f8": np.array([0.0, -0.0, np.inf, -np.inf, 5e-324, 1 / 3]),
        "bits": np.array([0x7FC00001, 0xFFC12345, 0x80000001], "u4").view("f4"),
    }
    # Above 2**17 symbols a tensor is alone, and levels and tables are static.
    scale = np.exp(rng.normal(size=(700, 1))) * np.exp(rng.normal(size=(1, 500)))
    groups = {
        "first": dense[:40, :90],
        "alone": np.rint(rng.laplace(size=(700, 500)) * scale * 0.35).astype(np.int32),
        "last": dense[40:80, :90].astype(np.int64) << 40,
        "signs": rng.integers(0, 2, (300, 500)).astype(bool),
        "new": rng.integers(0, 3, (300, 400)).astype(np.int8),
        "newer": rng.integers(0, 3, (300, 400)).astype(np.int8),
        "newest": rng.integers(0, 3, (300, 400)).astype(np.int8),
    }
    table = np.zeros((300, 10), np.int16)
    table[::3] = rng.integers(-2, 3, (12, 10))[rng.integers(0, 12, 100)]
    drawn = np.rint(rng.normal(0, 5, (40, 50))).astype("f4")
    colours = rng.normal(size=5).astype("f4")
    forms = {
        "lattice": drawn * np.float32(0.0123),
        "equal": (drawn * np.float32(0.0123)).reshape(50, 40),
        "half": (np.abs(drawn) * np.float32(0.5)).astype("f2"),
        "double": drawn.astype("f8") * 0.1,
        "rows": drawn * (rng.random((40, 1)) / 50 + 0.01).astype("f4"),
        "columns": drawn * (rng.random((1, 50)) / 50 + 0.01).astype("f4"),
        "palette": colours[rng.integers(0, 5, (40, 50))],
        "far": np.array([-(2**40), 7, 2**50])[rng.integers(0, 3, 400)],
    }
    text = np.frombuffer((__doc__ or "").encode() * 4, np.uint8)
    packs = {
        "ramp": np.arange(3000),
        "text": text,
        "again": text[5:] + np.uint8(0),
        "triangle": np.tril(np.ones((60, 60), bool)),
        "noise": rng.normal(size=300).astype("f4"),
    }
    near = {"f4": np.nextafter(floats["f4"], np.float32(1))}
    return {
        "empty": ({}, Context()),
        "shapes": (
            {"scalar": np.array(-7, "i8"), "none": np.zeros((3, 0, 2), "i4"), "é": np.ones(5, "?")},
            Context(),
        ),
        "widths": (widths, Context()),
        "floats": (floats, Context()),
        "floats_previous": (near, Context(previous={"f4": floats["f4"]})),
        "dense_lanes": ({"w": dense, "b": dense[0]}, Context()),
        "groups": (groups, Context()),
        "copies": ({"table": table, "flags": table > 0}, Context()),
        "forms": (forms, Context()),
        "rounded": rounded(),
        "packs": (packs, Context()),
        "packs_layout": (
            {"ramp": packs["ramp"]},
            Context(layout={"ramp": TensorSpec(np.dtype("i8"), (3000,))}),
        ),
        "neighbours": ({"w": smooth.astype(np.int16)}, Context()),
        "delta": ({"w": delta}, Context(layout=layout, previous={"w": held})),
        "update": ({"w": update}, Context(layout=layout, mask={"w": mask})),
        "update_previous": (
            {"w": update},
            Context(layout=layout, mask={"w": mask}, previous={"w": held}),
        ),
    }


def rounded() -> tuple[dict[str, Any], Context]:
    """Floats whose low bits are zero against such, beside what has no form and what has another."""
    rng = np.random.default_rng(20261128)
    held: dict[str, Any] = {}
    tensors: dict[str, Any] = {"step": rng.integers(-9, 10, 90).astype("f4") * np.float32(0.0123)}
    for dtype, bits in (("f2", "u2"), ("f4", "u4"), ("f8", "u8")):
        drawn = rng.normal(size=(6, 20))
        zeros = {"f2": 4, "f4": 17, "f8": 46}[dtype]
        mask = np.array(-1 << zeros, f"i{bits[1]}").view(bits)
        new, old = ((a.astype(dtype).view(bits) & mask).view(dtype) for a in (drawn * 1.05, drawn))
        new[0, :6] = old[1, :6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]
        new[0, 6:8] = np.array([1 << zeros, 3 << zeros], bits).view(dtype)  # subnormal
        held[dtype], tensors[dtype] = old, new
    held["exact"] = rng.normal(size=30).astype("f4")
    tensors["exact"] = held["exact"] * np.float32(1.05)
    held["counter"], tensors["counter"] = np.array([5, 7]), np.array([1, 2])
    return tensors, Context(previous=held)


def _encode(tensors: dict[str, Any], context: Context) -> bytes:
    return encode(tensors, context=context)


def _thorough(tensors: dict[str, Any], context: Context) -> bytes:
    return encode(tensors, context=context, thorough=True)


def _lanes(tensors: dict[str, Any], context: Context) -> bytes:
    """Encode with lanes what is small enough to be coded one symbol at a time."""
    with mock.patch.object(encoder, "_SERIAL_SYMBOLS", 0):
        return encode(tensors, context=context)


def _reseal(payload: bytes) -> bytes:
    return payload[:-4] + zlib.crc32(payload[:-4]).to_bytes(4, "little")


def _head(write: Callable[[AdaptiveEncoder], None], rest: bytes = b"") -> bytes:
    coder = AdaptiveEncoder()
    write(coder)
    return seal(Context(), coder.finish(), rest)


def _specs(*specs: tuple[bytes, int, tuple[int, ...]], count: int | None = None) -> bytes:
    """A head that stops after the layout: (name, dtype code, shape)."""

    def write(coder: AdaptiveEncoder) -> None:
        u = [coder.contexts(UINT_CONTEXTS) for _ in range(4)]
        letters = coder.contexts(256)
        coder.uint(u[0], len(specs) if count is None else count)
        for name, code, shape in specs:
            coder.uint(u[1], len(name))
            for byte in name:
                node = 1
                for shift in range(7, -1, -1):
                    coder.bit(letters + node, byte >> shift & 1)
                    node = 2 * node + (byte >> shift & 1)
            coder.uint(u[2], code * 33 + len(shape))
            for d in shape:
                coder.uint(u[3], d)

    return _head(write)


def _body(write: Callable[[AdaptiveEncoder, Callable[[], int]], None], dtype: str = "i4") -> bytes:
    """A head with one vector of ten elements, whose body ``write`` writes."""

    def whole(coder: AdaptiveEncoder) -> None:
        write_specs(coder, {"w": TensorSpec(np.dtype(dtype), (10,))})
        write(coder, lambda: coder.contexts(UINT_CONTEXTS))

    return _head(whole)


def must_fail() -> dict[str, bytes]:
    """Payloads that a decoder must refuse, by error and cause."""
    good = encode({"w": np.arange(10, dtype="i4")})
    layout = {"w": TensorSpec(np.dtype("i4"), (10,))}
    bound = encode({"w": np.arange(10, dtype="i4")}, context=Context(layout=layout))
    rng = np.random.default_rng(3)
    wide = _lanes({"w": rng.integers(-8, 9, (200, 200)).astype("i4")}, Context())
    swapped = bytearray(wide)
    swapped[-4 - len(unseal(wide, Context(), Limits()).rest) + 40] ^= 1

    def start(coder: AdaptiveEncoder, uint: Callable[[], int]) -> list[int]:
        models = [uint() for _ in range(6)]
        flags = coder.contexts(8)
        coder.bit(flags, 1)  # serial
        coder.bit(flags + 6, 0)  # not static
        return models

    def mode(coder: AdaptiveEncoder, uint: Callable[[], int]) -> None:
        coder.uint(start(coder, uint)[0], 9)

    def centre(coder: AdaptiveEncoder, uint: Callable[[], int]) -> None:
        models = start(coder, uint)
        coder.uint(models[0], 0)
        coder.sint(models[1], 1 << 31)

    def table_set(coder: AdaptiveEncoder, uint: Callable[[], int]) -> None:
        models = start(coder, uint)
        coder.uint(models[0], 1)
        coder.sint(models[1], 0)
        coder.uint(models[2], 1)

    def copies(kept: int, references: list[int]) -> bytes:
        # 64 rows of eight columns, of which `kept` are coded, all ones.
        specs = {"w": TensorSpec(np.dtype("i4"), (64, 8))}
        coder = AdaptiveEncoder()
        write_specs(coder, specs)
        write_copies(coder, specs, Context(), {"w": kept})
        values = [np.array(references, np.int32), np.ones(kept * 8, np.int32)]
        rest, _ = encode_body(coder, copied_fields("w", specs["w"], kept), values)
        return seal(Context(), coder.finish(), rest)

    pair = {"a": TensorSpec(np.dtype("i4"), (40,)), "b": TensorSpec(np.dtype("i4"), (5, 8))}
    real = {"a": TensorSpec(np.dtype("f4"), (40,))}
    flags = {"a": TensorSpec(np.dtype("?"), (40,))}

    def forms(
        specs: dict[str, TensorSpec],
        given: dict[str, Any],
        *values: Any,
        packs: tuple[tuple[Pack, bytes], ...] = (),
    ) -> bytes:
        coder = AdaptiveEncoder()
        write_specs(coder, specs)
        write_forms(coder, specs, Context(), {}, given, [one for one, _ in packs])
        fields = [f for own in all_fields(specs, Context(), {}, given).values() for f in own]
        flat = [np.asarray(v, np.int32) for v in values]
        rest, _ = encode_body(coder, fields, flat)
        return seal(Context(), coder.finish(), rest + b"".join(d for _, d in packs), forms=True)

    def unread(*numbers: int) -> bytes:
        """Forms as numbers that no encoder writes."""
        coder = AdaptiveEncoder()
        write_specs(coder, pair)
        models = [coder.contexts(UINT_CONTEXTS) for _ in range(6)]
        for model, number in zip((0, 0, 1), numbers, strict=False):
            coder.uint(models[model], number)
        return seal(Context(), coder.finish(), b"", forms=True)

    def packed(coder: int, data: bytes, specs: dict[str, TensorSpec] = pair) -> bytes:
        one = Pack(coder, False, len(data), list(specs))
        return forms(specs, dict.fromkeys(specs, Packed(0)), packs=((one, data),))

    size = sum(spec.nbytes for spec in pair.values())
    squeezed = [compress(bytes(size)) for compress, _ in CODERS]
    more = [compress(bytes(size + 1)) for compress, _ in CODERS]
    less = [compress(bytes(size - 1)) for compress, _ in CODERS]
    bomb = [compress(bytes(1 << 24)) for compress, _ in CODERS]
    bad: dict[str, bytes] = {}
    for number, name in enumerate(("zlib", "bz2", "lzma")):
        bad |= {
            f"MalformedPayload--pack_{name}_longer": packed(number, more[number]),
            f"MalformedPayload--pack_{name}_shorter": packed(number, less[number]),
            f"MalformedPayload--pack_{name}_bomb": packed(number, bomb[number]),
            f"MalformedPayload--pack_{name}_cut": packed(number, squeezed[number][:-3]),
            f"MalformedPayload--pack_{name}_followed": packed(number, squeezed[number] + b"x"),
            f"MalformedPayload--pack_{name}_noise": packed(number, bytes(range(90, 190))),
        }

    return bad | {
        "MalformedPayload--pack_holds_no_bool": packed(0, CODERS[0][0](b"\2" * 40), flags),
        "MalformedPayload--pack_of_unknown_coder": packed(3, b"x"),
        "MalformedPayload--pack_beyond_the_payload": forms(
            pair,
            dict.fromkeys(pair, Packed(0)),
            packs=((Pack(0, False, 99, ["a", "b"]), b"x"),),
        ),
        "MalformedPayload--form_unknown": unread(5),
        "MalformedPayload--equal_to_nothing": unread(1, 0),
        "MalformedPayload--equal_to_itself_before": unread(0, 1, 1),
        "MalformedPayload--equal_to_an_equal": forms(
            pair | {"c": pair["a"]}, {"b": Equal("a"), "c": Equal("b")}, [1] * 40
        ),
        "MalformedPayload--equal_of_other_size": forms(
            {"a": TensorSpec(np.dtype("i4"), (41,)), "b": pair["b"]}, {"b": Equal("a")}, [1] * 41
        ),
        "MalformedPayload--lattice_of_integers": forms(pair, {"a": Lattice()}, [1] * 40, [1] * 40),
        "MalformedPayload--lattice_of_a_vector_by_rows": forms(
            real, {"a": Lattice(1)}, *[[0]] * 8, [1] * 40
        ),
        "MalformedPayload--lattice_step_zero": forms(real, {"a": Lattice(step=0.0)}, [1] * 40),
        "MalformedPayload--lattice_step_negative": forms(real, {"a": Lattice(step=-1.0)}, [1] * 40),
        "MalformedPayload--lattice_step_nan": forms(
            real, {"a": Lattice(step=float("nan"))}, [1] * 40
        ),
        "MalformedPayload--palette_index": forms(
            real, {"a": Palette(3)}, *[[0, 1, 2]] * 4, [3] * 40
        ),
        "MalformedPayload--palette_too_large": forms(
            real, {"a": Palette(41)}, *[[0] * 41] * 4, [3] * 40
        ),
        "MalformedPayload--palette_of_bool": forms(flags, {"a": Palette(2)}, [0, 1], [1] * 40),
        "MalformedPayload--copies_keep_too_many": copies(64, [0] * 64),
        "MalformedPayload--copies_keep_none": copies(0, [1] * 64),
        "MalformedPayload--copy_of_no_row": copies(2, [0, 0, *[3] * 62]),
        "MalformedPayload--copy_before_any_row": copies(2, [0, 0, *[-1] * 62]),
        "MalformedPayload--copies_of_other_number": copies(2, [0, 0, 0, *[1] * 61]),
        "NotAPayload--magic": _reseal(b"PCX" + good[3:]),
        "NotAPayload--nothing": b"",
        "UnsupportedVersion--major": _reseal(good[:3] + b"\x01" + good[4:]),
        "UnsupportedVersion--flag": _reseal(good[:5] + b"\x08" + good[6:]),
        "TruncatedPayload--half": good[: len(good) // 2],
        "TruncatedPayload--start": good[:5],
        "TruncatedPayload--longer": good + b"\0",
        "ChecksumMismatch--bit": good[:9] + bytes([good[9] ^ 1]) + good[10:],
        "ContextMismatch--missing": bound,
        "MalformedPayload--length_not_shortest": _reseal(
            good[:6] + bytes([len(good) + 1 | 128, 0]) + good[7:]
        ),
        "MalformedPayload--head_too_long": _reseal(good[:7] + b"\x7f" + good[8:]),
        "MalformedPayload--section_left_over": _head(lambda c: write_specs(c, {}), rest=b"more"),
        "LimitExceeded--elements": _specs((b"w", 3, (1 << 30, 1 << 30))),
        "LimitExceeded--expansion": _specs((b"w", 3, (1 << 27,))),
        "LimitExceeded--tensors": _specs(count=1 << 17),
        "LimitExceeded--name": _specs((b"w" * 1025, 3, ())),
        "MalformedPayload--name_twice": _specs((b"w", 3, ()), (b"w", 3, ())),
        "MalformedPayload--name_not_utf8": _specs((b"\xff", 3, ())),
        "MalformedPayload--dtype": _specs((b"w", 12, ())),
        "MalformedPayload--mode": _body(mode),
        "MalformedPayload--centre": _body(centre),
        "MalformedPayload--table_set": _body(table_set),
        "MalformedPayload--states": _reseal(bytes(swapped)),
        "MalformedPayload--adaptive_section_ends": seal(Context(), b"\x01\x02", b""),
        "MalformedPayload--bool": _not_bool(),
    }


def _not_bool() -> bytes:
    """A bool tensor that holds 2 and 3."""
    specs = {"w": TensorSpec(np.dtype("?"), (10,))}
    coder = AdaptiveEncoder()
    write_specs(coder, specs)
    values = [np.array([0, 1, 2, 3, 1, 0, 1, 0, 1, 1], np.int32)]
    rest, _ = encode_body(coder, fields_of(specs, Context())["w"], values)
    return seal(Context(), coder.finish(), rest)


def _known(context: Context) -> dict[str, Any]:
    """Masks and previous values of a context, as they are called in a file."""
    arrays: dict[str, Any] = {f"mask:{k}": v for k, v in (context.mask or {}).items()}
    return arrays | {f"previous:{k}": v for k, v in (context.previous or {}).items()}


def main() -> None:
    """Write all vectors."""
    (FOLDER / "must_fail").mkdir(parents=True, exist_ok=True)
    for name, (tensors, context) in golden().items():
        how = _lanes if name in ("dense_lanes", "neighbours") else _encode
        if name.startswith("packs"):
            how = _thorough
        (FOLDER / f"{name}.bin").write_bytes(how(tensors, context))
        arrays = {f"tensor:{k}": np.asarray(v) for k, v in tensors.items()}
        arrays |= _known(context)
        arrays["layout"] = np.array(context.layout is not None)
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    made = must_fail() | {name: payload for name, (payload, _) in hostile().items()}
    for name, (payload, context) in mismatched().items():
        made[name] = payload
        arrays = _known(context)
        arrays |= {
            f"layout:{k}": np.zeros(s.shape, s.dtype) for k, s in (context.layout or {}).items()
        }
        np.savez_compressed(FOLDER / "must_fail" / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    for name, payload in made.items():
        (FOLDER / "must_fail" / f"{name}.bin").write_bytes(payload)


if __name__ == "__main__":
    main()
