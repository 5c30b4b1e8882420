"""Size and speed of the codec against general-purpose coders, on the same integers.

    python benchmarks/codec.py [--json FILE] [--repeat N] [--case NAME ...]

Built-in cases are seeded synthetic tensors with the shapes and statistics of trained networks.
With PRUNECAST_DATA set to a folder, every ``*update*.npz`` in it is quantised with one step to a
relative L2 error of 0.01, 0.25 and 0.6, and every other ``*.npz`` to 0.01 and pruned to 10 %.
Coders: ours; zlib -6; zstd -19 (package zstandard, named when absent); bitmap + zlib; gaps + zlib.
Times are CPU seconds of the best of N runs after a warm-up; MB are of raw float32; memory is the
peak that Python's allocator traces beyond the input, in multiples of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Context, TensorSpec, decode, encode

Tensors = dict[str, NDArray[Any]]


@dataclass
class Case:
    """Integers to code and what both sides know."""

    name: str
    tensors: Tensors
    context: Context | None = None


# --- data ------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, dict[str, tuple[int, ...]]] = {
    "lenet": {
        "c1": (6, 1, 5, 5), "c2": (16, 6, 5, 5), "f1": (84, 400), "f2": (84, 84), "f3": (10, 84),
    },
    "resnet-groupnorm": {
        "stem": (32, 1, 3, 3),
        **{
            f"b{i}.{j}": shape
            for i, (a, b) in enumerate([(32, 64), (64, 128), (128, 256)])
            for j, shape in enumerate([(b, a, 3, 3), (b,), (b, b, 3, 3), (b,), (b, a, 1, 1)])
        },
        "head": (10, 256),
    },
    "transformer": {
        f"l{i}.{n}": shape
        for i in range(3)
        for n, shape in {
            "qkv": (384, 128), "out": (128, 128), "up": (512, 128), "down": (128, 512),
            "norm": (128,),
        }.items()
    },
    "lstm": {"ih0": (512, 28), "hh0": (512, 128), "ih1": (512, 128), "hh1": (512, 128)},
    "embedding": {"table": (20_000, 64)},
}  # fmt: skip


def synthetic(name: str, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Laplacian values whose scale is a product over rows and columns, as updates have it."""
    rng = np.random.default_rng(seed)
    out = {}
    for key, shape in ARCHITECTURES[name].items():
        rows = np.exp(0.6 * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
        columns = np.exp(0.4 * rng.normal(size=(1, *shape[1:]))) if len(shape) > 1 else 1.0
        out[key] = (rng.laplace(size=shape) * rows * columns).astype(np.float32)
    return out


def to_error(values: dict[str, Any], error: float) -> Tensors:
    """Integers at the one step for all tensors that gives this relative L2 error."""
    wide = {k: v.astype(np.float64) for k, v in values.items()}
    norm = np.sqrt(sum(float((v**2).sum()) for v in wide.values()))
    low, high = 1e-12, 1e3
    for _ in range(50):
        step = float(np.sqrt(low * high))
        lost = sum(float(((np.rint(v / step) * step - v) ** 2).sum()) for v in wide.values())
        low, high = (low, step) if np.sqrt(lost) / norm > error else (step, high)
    return {k: np.rint(v / low).astype(np.int32) for k, v in wide.items()}


def pruned(tensors: Tensors, density: float) -> Tensors:
    """Keep the largest magnitudes of every matrix."""
    return {
        k: np.where(np.abs(q) > np.quantile(np.abs(q), 1 - density), q, 0).astype(np.int32)
        if q.ndim > 1
        else q
        for k, q in tensors.items()
    }


def _layout(tensors: Tensors) -> dict[str, TensorSpec]:
    return {k: TensorSpec(v.dtype, v.shape) for k, v in tensors.items()}


def cases() -> Iterator[Case]:
    """Built-in cases, then those of PRUNECAST_DATA."""
    for name in ARCHITECTURES:
        values = synthetic(name)
        for error in (0.01, 0.25, 0.6):
            yield Case(f"{name}/update-{error}", to_error(values, error))
        rng = np.random.default_rng(1)
        weights = pruned(to_error(values, 0.05), 0.1)
        yield Case(f"{name}/pruned", weights)
        delta, update = {}, {}
        for k, q in weights.items():
            moved = rng.integers(-1, 2, q.shape) * (rng.random(q.shape) < 0.15) * (q != 0)
            delta[k] = np.where(rng.random(q.shape) < 0.02, -q, moved).astype(np.int32)
            sent = rng.random(q.shape) < 0.06
            update[k] = (rng.choice([-2, -1, -1, 1, 1, 2], q.shape) * sent * (q != 0)).astype("i4")
        yield Case(f"{name}/delta", delta, Context(layout=_layout(delta), previous=weights))
        mask = {k: q != 0 for k, q in weights.items()}
        yield Case(f"{name}/masked", update, Context(layout=_layout(update), mask=mask))
    folder = os.environ.get("PRUNECAST_DATA")
    for path in sorted(Path(folder).glob("*.npz")) if folder else ():
        with np.load(path, allow_pickle=False) as archive:
            values = {k: archive[k].astype(np.float32) for k in archive.files}
        if "update" in path.stem:
            for error in (0.01, 0.25, 0.6):
                yield Case(f"{path.stem}/{error}", to_error(values, error))
            yield Case(f"{path.stem}/top-1%", pruned(to_error(values, 0.3), 0.01))
        else:
            dense = to_error(values, 0.01)
            yield Case(f"{path.stem}/dense", dense)
            yield Case(f"{path.stem}/pruned", pruned(dense, 0.1))


# --- peers -----------------------------------------------------------------------------------

Coder = tuple[Callable[[NDArray[np.int32]], bytes], Callable[[bytes, int], NDArray[np.int32]]]


def _narrow(q: NDArray[np.int32]) -> NDArray[Any]:
    top = int(np.abs(q).max(initial=0))
    return q.astype("i1" if top < 128 else "i2" if top < 1 << 15 else "i4")


def plain(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Coder:
    """The integers in their narrowest dtype, then a general-purpose compressor."""

    def enc(q: NDArray[np.int32]) -> bytes:
        narrow = _narrow(q)
        return bytes([narrow.itemsize]) + pack(narrow.tobytes())

    return enc, lambda b, n: np.frombuffer(unpack(b[1:]), f"i{b[0]}").astype(np.int32)


def bitmap(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Coder:
    """One bit for each position, then the non-zeros."""

    def enc(q: NDArray[np.int32]) -> bytes:
        values = _narrow(q[q != 0])
        packed = np.packbits(q != 0).tobytes() + values.tobytes()
        return bytes([values.itemsize]) + pack(packed)

    def dec(data: bytes, n: int) -> NDArray[np.int32]:
        raw = unpack(data[1:])
        used = np.unpackbits(np.frombuffer(raw[: (n + 7) // 8], "u1"), count=n).astype(bool)
        out = np.zeros(n, np.int32)
        out[used] = np.frombuffer(raw[(n + 7) // 8 :], f"i{data[0]}")
        return out

    return enc, dec


def gaps(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Coder:
    """Distances between non-zeros as bytes (255: more follows), then the non-zeros."""

    def enc(q: NDArray[np.int32]) -> bytes:
        at = np.flatnonzero(q)
        distance = np.diff(at, prepend=-1) - 1
        more = distance // 255
        stream = np.full(int(more.sum()) + len(at), 255, np.uint8)
        stream[np.cumsum(more + 1) - 1] = distance % 255
        values = _narrow(q[at])
        head = bytes([values.itemsize]) + len(at).to_bytes(8, "little")
        return head + pack(values.tobytes() + stream.tobytes())

    def dec(data: bytes, n: int) -> NDArray[np.int32]:
        width, count = data[0], int.from_bytes(data[1:9], "little")
        raw = unpack(data[9:])
        stream = np.frombuffer(raw[width * count :], "u1")
        steps = np.cumsum(stream + (stream < 255).astype(np.int64))[stream < 255]
        out = np.zeros(n, np.int32)
        out[steps - 1] = np.frombuffer(raw[: width * count], f"i{width}")
        return out

    return enc, dec


def peers() -> dict[str, Coder | str]:
    """Coders by name; a string says why one is absent."""
    deflate = (lambda b: zlib.compress(b, 6), zlib.decompress)
    found: dict[str, Coder | str] = {
        "zlib -6": plain(*deflate),
        "bitmap + zlib": bitmap(*deflate),
        "gaps + zlib": gaps(*deflate),
    }
    try:
        import zstandard
    except ImportError:
        found["zstd -19"] = "absent: pip install zstandard"
    else:
        best, reader = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
        found["zstd -19"] = plain(best.compress, reader.decompress)
    return found


# --- measuring -------------------------------------------------------------------------------


def entropy(q: NDArray[Any]) -> float:
    """Zeroth-order entropy of one tensor, in bits."""
    _, counts = np.unique(q, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def timed(call: Callable[[], Any], repeat: int) -> tuple[Any, float]:
    """Result and least CPU seconds, after one warm-up."""
    result = call()
    least = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        call()
        least = min(least, time.process_time() - start)
    return result, max(least, 1e-9)


def peak(call: Callable[[], Any]) -> int:
    """Peak bytes allocated during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure(case: Case, repeat: int) -> list[dict[str, Any]]:
    """One row for each coder."""
    n = sum(q.size for q in case.tensors.values())
    ideal = sum(entropy(q) for q in case.tensors.values())
    raw = 4 * n
    rows = []

    def add(
        coder: str, size: int, seconds: tuple[float, float], memory: tuple[float, float]
    ) -> None:
        rows.append(
            {
                "case": case.name,
                "parameters": n,
                "coder": coder,
                "bytes": size,
                "bits_per_parameter": 8 * size / n,
                "entropy_bits_per_parameter": ideal / n,
                "against_entropy": 8 * size / ideal - 1 if ideal else None,
                "encode_mb_s": raw / seconds[0] / 1e6,
                "decode_mb_s": raw / seconds[1] / 1e6,
                "encode_peak": memory[0] / raw,
                "decode_peak": memory[1] / raw,
            }
        )

    def ours() -> bytes:
        return encode(case.tensors, context=case.context)

    payload, t_enc = timed(ours, repeat)
    decoded, t_dec = timed(lambda: decode(payload, context=case.context), repeat)
    if any(not np.array_equal(decoded[k], q) for k, q in case.tensors.items()):
        raise SystemExit(f"{case.name}: not lossless")
    memory = peak(ours), peak(lambda: decode(payload, context=case.context))
    add("prunecast", len(payload), (t_enc, t_dec), memory)

    for name, coder in peers().items():
        if isinstance(coder, str):
            rows.append({"case": case.name, "coder": name, "absent": coder})
            continue
        enc, dec = coder
        flat = {k: q.reshape(-1) for k, q in case.tensors.items()}
        slow = 1 if "19" in name else repeat

        def pack(enc: Any = enc, flat: Tensors = flat) -> list[bytes]:
            return [enc(q) for q in flat.values()]

        parts, t_enc = timed(pack, slow)

        def unpack(dec: Any = dec, flat: Tensors = flat, parts: Any = parts) -> list[Any]:
            return [dec(b, q.size) for b, q in zip(parts, flat.values(), strict=True)]

        back, t_dec = timed(unpack, slow)
        if any(not np.array_equal(a, b) for a, b in zip(back, flat.values(), strict=True)):
            raise SystemExit(f"{case.name}, {name}: not lossless")
        add(name, sum(map(len, parts)), (t_enc, t_dec), (peak(pack), peak(unpack)))
    return rows


def main() -> None:
    """Run the cases, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--case", nargs="*", default=[], help="only cases whose name contains one")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        f"{'case':34} {'coder':14} {'bytes':>9} {'bits/par':>9} {'vs H0':>8} "
        f"{'enc':>6} {'dec':>6} MB/s  peak"
    )
    for case in cases():
        if arguments.case and not any(part in case.name for part in arguments.case):
            continue
        for row in measure(case, arguments.repeat):
            rows.append(row)
            if "absent" in row:
                print(f"{row['case']:34} {row['coder']:14} {row['absent']}")
                continue
            gap = row["against_entropy"]
            print(
                f"{row['case']:34} {row['coder']:14} {row['bytes']:9d} "
                f"{row['bits_per_parameter']:9.4f} {'' if gap is None else f'{gap:+8.1%}'} "
                f"{row['encode_mb_s']:6.0f} {row['decode_mb_s']:6.0f}       "
                f"{row['encode_peak']:.1f}/{row['decode_peak']:.1f}",
                flush=True,
            )
    report = {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
