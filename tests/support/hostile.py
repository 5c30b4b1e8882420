"""Payloads that a decoder must refuse, written by hand: one rule broken in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuzz.writer import HeadWriter
from prunecast.compression.codec import Context, TensorSpec
from prunecast.compression.codec.container.wire import seal
from prunecast.compression.codec.entropy.rans import RansTables
from prunecast.compression.codec.entropy.streams import LaneStream, write_stream

__all__ = ["Plan", "hostile", "mismatched"]


@dataclass(frozen=True)
class Plan:
    """Everything that a payload of one vector says; as it stands, it decodes to 0, -1, 1, -2.

    The token scheme is direct = 2, mantissa = 0: tokens 0 to 3 are values, tokens 4, 5, ... have
    2, 3, ... raw bits.
    """

    dtype: str = "int8"
    shape: tuple[int, ...] = (4,)
    serial: bool = False
    static: bool = False
    mode: int = 1
    base: int = 0
    step: int | None = None
    middle: int = 0
    levels: tuple[int, ...] = (0, 0, 0, 0)
    depth: int = 0
    grouping: int = 1
    first: int = 0
    further: int = 0
    cluster: int = 1
    named: bool = True
    scheme: int = 4 * 2
    sparse: bool = False
    precision: int = 9
    size: int = 8
    off: int = 0
    tokens: tuple[int, ...] = (0, 1, 2, 3)
    bits: bytes = b""
    raw: int | None = None
    lanes: int = 1
    states: int | None = None
    words: int = 0
    data: bytes | None = None
    extra: bytes = b""
    nonzeros: int = 0
    gaps: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    tail: int = 0
    tables: tuple[int, ...] = ()
    state: int = 1 << 16
    static_words: int = 0

    def payload(self) -> bytes:
        """Write it."""
        w = HeadWriter()
        w.layout([("w", self.dtype, self.shape)])
        w.coding(serial=self.serial, static=self.static)
        if self.mode == 1:
            self._field(w)
            self._clusters(w)
        else:
            w.uint("mode", self.mode)
            w.sint("centre", 0)
        w.uint("general", self.scheme)
        if self.mode == 1 and self.named:
            w.bit("sparse", self.sparse)
        rest = b""
        if not self.serial:
            rest = self._segment(w)
        if self.static:
            self._side(w)
        if self.serial:
            self._symbols(w)
        return seal(Context(), w.coder.finish(), rest)

    def _field(self, w: HeadWriter) -> None:
        w.uint("mode", 1)
        w.sint("centre", 0)
        w.uint("set", 0)
        w.bit("rows", False)
        w.bit("columns", self.step is not None)
        w.sint("base", self.base)
        if self.step is not None:
            w.uint("step", self.step - 1)
            w.uint("middle", self.middle)
            for v in self.levels if not self.static else ():
                w.sint("level 3", v)
        if not self.dtype.endswith("64"):
            w.uint("depth", self.depth)
        if not self.serial:
            w.uint("grouping", self.grouping)

    def _clusters(self, w: HeadWriter) -> None:
        for row in range(16):
            if w.bit(f"class {row}", self.named and row == 0):
                w.uint("range", self.first)
                w.uint("range", self.further)
                w.uint("cluster", self.cluster)

    def _segment(self, w: HeadWriter) -> bytes:
        w.uint("general", self.precision)
        kinds = ("gaps", "values") if self.sparse else ("dense",)
        for kind in kinds if self.named else ():
            if w.bit("table", True):
                w.uint(f"{kind} size", self.size - 1)
                if not self.static:
                    for i in range(self.size):
                        if i + 1 < self.size:
                            w.bit(f"{kind} absent", False)
                        w.sint(f"{kind} log {min(i, 3)}", self.off)
        f = np.full((2, self.size), (1 << 9) // self.size, np.uint32)
        size = self.size
        keys = [*self.gaps, *(size + v for v in self.values)] if self.sparse else self.tokens
        entry, data = write_stream(
            np.array(keys, np.int64), RansTables(f, 9), self.lanes, self.bits
        )
        stated = LaneStream(
            entry.lanes,
            entry.state_bytes if self.states is None else self.states,
            entry.words + self.words,
        )
        w.stream(stated)
        w.uint("raw", len(self.bits) if self.raw is None else self.raw)
        if self.sparse:
            w.uint("nonzeros", self.nonzeros)
        w.uint("tail", self.tail)
        if self.tail:
            w.stream(LaneStream(1, 4, 0))
        return (data if self.data is None else self.data) + self.extra

    def _side(self, w: HeadWriter) -> None:
        """Static tables that hold but symbol 0, under the contexts of ``tables``."""
        for context in range(16):
            if w.bit("present", context in self.tables):
                w.uint("side size", 0)
                w.sint("side log 0", 0)
        w.coder.bits(self.state, 32)
        w.uint("static words", self.static_words)

    def _symbols(self, w: HeadWriter) -> None:
        if self.mode != 1:
            return
        if self.sparse:
            w.uint("number", self.nonzeros)
            for gap, value in zip(self.gaps, self.values, strict=True):
                w.uint("gap", gap)
                w.uint("value", value)
            return
        for v in self.tokens:
            w.uint("dense", v)


def _envelope(before: bytes) -> bytes:
    """A payload of the version in use whose bytes after the flags are ``before``."""
    return seal(Context(), b"", b"")[:6] + before


def _names(*tensors: tuple[str, str, Sequence[int]]) -> bytes:
    w = HeadWriter()
    w.uint("count", len(tensors))
    for name, dtype, shape in tensors:
        w.tensor(name, dtype, shape)
    return seal(Context(), w.coder.finish(), b"")


def _many_segments() -> bytes:
    """Eight groups for each of 2049 tensors, before the first segment."""
    w = HeadWriter()
    w.layout([(f"{i:04}", "float64", (1,)) for i in range(2049)])
    w.coding(serial=False)
    for _ in range(8 * 2049):
        w.field(serial=False)
    return seal(Context(), w.coder.finish(), b"")


def _tables() -> bytes:
    w = HeadWriter()
    w.layout([("w", "int8", (1,))])
    w.coding(serial=False)
    w.field(serial=False)
    w.clusters(129)
    w.uint("general", 8)
    for _ in range(129):
        w.bit("sparse", False)
    w.uint("general", 14)
    return seal(Context(), w.coder.finish(), b"")


def hostile() -> dict[str, tuple[bytes, str]]:
    """``ERROR--CAUSE`` to a payload and what the error's message says."""
    fine = Plan()
    sparse = replace(fine, sparse=True, nonzeros=2, gaps=(0, 1), values=(3, 3))
    serial = replace(fine, serial=True)
    static = replace(serial, static=True)
    words = bytes([0x3F, 0])
    return {
        f"{error}--{cause}": (payload, says)
        for error, group in {
            "LimitExceeded": {
                "decoded_bytes": (_names(("w", "float64", (1 + (1 << 28),))), "decoded_bytes"),
                "levels": (replace(fine, shape=(1, 1 << 23), step=1).payload(), "levels"),
                "segments": (_many_segments(), "segments"),
                "table_slots": (_tables(), "table_slots"),
                "lanes": (replace(fine, lanes=(1 << 14) + 1, data=b"").payload(), "lanes"),
                "serial_symbols": (replace(serial, shape=(1 << 21,)).payload(), "serial_symbols"),
                "steps": (replace(fine, shape=(1 << 23,)).payload(), "steps"),
            },
            "MalformedPayload": {
                "length_of_ten_bytes": (_envelope(b"\xff" * 10), "nine bytes"),
                "dimension": (_names(("w", "int8", (1 << 62, 0))), "beyond 2"),
                "empty_shape": (_names(("w", "int32", (1 << 61, 0))), "no array"),
                "base": (replace(fine, base=64).payload(), "base activity"),
                "levels_step": (replace(fine, step=65).payload(), "multiples"),
                "levels_middle": (replace(fine, step=32, middle=2).payload(), "out of range"),
                "level": (replace(fine, step=8, levels=(8, 0, 0, 0)).payload(), "out of range"),
                "level_below": (replace(fine, step=8, levels=(-1, 0, 0, 0)).payload(), "range"),
                "depth": (replace(fine, depth=4).payload(), "further phases"),
                "grouping": (replace(fine, grouping=3).payload(), "grouping"),
                "map_range": (replace(fine, first=60, further=4).payload(), "range of activities"),
                "map_first": (replace(fine, cluster=0).payload(), "names cluster -1"),
                "map_cluster": (replace(fine, cluster=2).payload(), "names cluster 0"),
                "no_cluster": (replace(fine, named=False).payload(), "no cluster"),
                "scheme_direct": (replace(fine, scheme=4 * 8).payload(), "scheme"),
                "scheme_mantissa": (replace(fine, scheme=4 + 2).payload(), "scheme"),
                "precision_low": (replace(fine, precision=8).payload(), "precision"),
                "precision_high": (replace(fine, precision=15).payload(), "precision"),
                "table_size": (replace(fine, size=257).payload(), "at most 256"),
                "table_high": (replace(fine, off=-1).payload(), "holds 64"),
                "table_low": (replace(fine, off=63).payload(), "holds 0"),
                "state_bytes": (replace(fine, lanes=8, states=-1).payload(), "for 8 states"),
                "states_short": (
                    replace(fine, lanes=8, states=8, data=bytes(8)).payload(), "raw bits"),
                "segment_too_long": (replace(fine, words=1).payload(), "segments are longer"),
                "words_left": (replace(fine, words=1, extra=words).payload(), "left over"),
                "words_missing": (replace(fine, tokens=(0, 1) * 9, shape=(99,)).payload(), "few"),
                "padding": (replace(fine, bits=b"x", raw=0).payload(), "padding"),
                "raw_left": (replace(fine, bits=b"\0").payload(), "raw bits"),
                "raw_missing": (replace(fine, tokens=(0, 1, 2, 4)).payload(), "raw bits"),
                "tail": (replace(fine, tail=5, data=bytes(6)).payload(), "tail"),
                "token": (_wide(), "more than 32 bits"),
                "width": (
                    replace(fine, tokens=(0, 1, 2, 10), size=16, bits=b"\0").payload(),
                    "exceeds 8",
                ),
                "nonzeros": (replace(sparse, nonzeros=5).payload(), "more non-zeros"),
                "gap": (replace(sparse, gaps=(0, 3)).payload(), "gap"),
                "serial_nonzeros": (
                    replace(sparse, serial=True, nonzeros=5).payload(), "more non-zeros"),
                "serial_gap": (replace(sparse, serial=True, gaps=(0, 3)).payload(), "gap"),
                "serial_width": (replace(serial, tokens=(0, 1, 2, 256)).payload(), "exceeds 8"),
                "serial_wide": (replace(serial, tokens=(0, 1, 2, 1 << 32)).payload(), "exceeds 32"),
                "value_wraps": (
                    replace(sparse, serial=True, dtype="int32", values=(0, 2**32 - 1)).payload(),
                    "exceeds 32"),
                "static_too_long": (replace(static, static_words=1).payload(), "longer"),
                "static_state": (replace(static, state=1 << 17).payload(), "where it started"),
                "static_absent": (replace(static, step=1).payload(), "absent table"),
                "static_table": (
                    replace(fine, static=True, tables=(8, 11, 13, 15)).payload(),
                    "the last token"),
            },
        }.items()
        for cause, (payload, says) in group.items()
    }  # fmt: skip


def _wide() -> bytes:
    """Token 32 under direct = 2: a value of 30 + 2 bits."""
    return replace(Plan(), dtype="int32", size=64, tokens=(0, 1, 2, 34)).payload()


def mismatched() -> dict[str, tuple[bytes, Context]]:
    """``ERROR--CAUSE`` to a payload of an int8 vector of four and a context against it."""
    w = HeadWriter()
    w.layout([("w", "int8", (4,))])
    head = w.coder.finish()
    held = np.arange(4, dtype=np.int8)
    contexts = {
        "TensorMismatch--mask_shape": Context(mask={"w": np.ones(3, np.bool_)}),
        "TensorMismatch--mask_dtype": Context(mask={"w": np.ones(4, np.int8)}),
        "TensorMismatch--previous_shape": Context(previous={"w": np.ones((2, 2), np.int8)}),
        "TensorMismatch--previous_dtype": Context(previous={"w": np.ones(4, np.float32)}),
        "UnsupportedDtype--layout": Context(layout={"w": TensorSpec(np.dtype("c8"), (4,))}),
    }
    result = {name: (seal(context, head, b""), context) for name, context in contexts.items()}
    result["ContextMismatch--other_values"] = (
        seal(Context(previous={"w": held}), head, b""),
        Context(previous={"w": held + np.int8(1)}),
    )
    floats = Context(previous={"w": np.ones(4, np.float32)})
    integers = Context(previous={"w": held})
    for name, dtype, context, zeros, value in (
        ("zeros_of_every_bit", "float32", floats, 32, 0),
        ("rounded_beyond_its_bits", "float32", floats, 17, 1 << 15),
        ("rounded_below_its_bits", "float32", floats, 17, -(1 << 15)),
        ("zeros_of_integers", "int8", integers, 17, 0),
    ):
        w = HeadWriter()
        w.layout([("w", dtype, (4,))])
        w.uint("zeros", zeros)
        w.coding(serial=True)
        w.uint("mode", 0)
        w.sint("centre", value)
        w.uint("general", 4 * 2)
        result[f"MalformedPayload--{name}"] = (
            seal(context, w.coder.finish(), b"", forms=True),
            context,
        )
    result["ContextMismatch--more_given"] = (Plan().payload(), Context(previous={"w": held}))
    return result
